"""Batch norm alone, and with ReLU, forward and backward apart, beside PyTorch eager.

Shapes of small and large networks in float32, channels first (NCHW) and last (NHWC; in PyTorch
`memory_format=channels_last`). Forward is `F.batch_norm(..., training=True)` with weight, bias and
running statistics; backward is `y.backward(g)`, with gradients for x, weight and bias. With ReLU it
is `F.batch_norm_relu` here, and there `F.relu(F.batch_norm(...))`. First it is checked that both
give the same y, gradients and running statistics.

Reported: milliseconds as median [quartiles], and the ratio to PyTorch, turn by turn; below 1 we are
faster. The summary is the geometric mean of the ratios of forward plus backward, and the worst one.
What is compared is not quite the same work: our statistics are exact where PyTorch's are not
(benchmarks/analytic_rule.py has the errors).

Last come our two layouts of the same sizes beside each other, in one process, turn by turn.

    python benchmarks/batch_norm.py --quick
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any, ClassVar

import numpy as np
from _measure import Contender, ratios, seconds, summarize, take_turns
from _process import Remote
from _report import close_report, open_report, parser, plan, present, print_table

#: (layout, sizes in the order N, C, H, W; the channels are put last for NHWC)
CASES = (
    ("NCHW", (256, 20, 24, 24)),
    ("NCHW", (256, 50, 10, 10)),
    ("NCHW", (32, 64, 56, 56)),
    ("NHWC", (256, 20, 24, 24)),
    ("NHWC", (256, 50, 10, 10)),
    ("NHWC", (32, 64, 56, 56)),
    ("NC", (4096, 1024)),
)
Shape = tuple[int, ...]


def draw(shape: Shape) -> dict[str, np.ndarray]:
    """Return inputs and a cotangent, by name."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal(shape, np.float32) + 0.5,
        "weight": rng.standard_normal(shape[1], np.float32),
        "bias": rng.standard_normal(shape[1], np.float32),
        "g": rng.standard_normal(shape, np.float32),
    }


class BatchNorm(Contender):
    """Both phases; a library fills in `start` and how batch norm is called.

    with_relu: whether ReLU follows.
    """

    phases: ClassVar = ("forward", "backward")

    def __init__(self, layout: str, shape: Shape, with_relu: bool, threads: int):
        self.layout = layout
        self.with_relu = with_relu
        self.start(threads, **draw(shape))

    def start(self, threads: int, **arrays: np.ndarray) -> None:
        """Set `x`, `weight`, `bias`, `g`, `running_mean` and `running_var`, Tensors all."""
        raise NotImplementedError

    def apply(self) -> Any:
        raise NotImplementedError

    def forward(self) -> None:
        for leaf in (self.x, self.weight, self.bias):
            leaf.grad = None
        self.y = self.apply()

    def backward(self) -> None:
        self.y.backward(self.g)

    def results(self) -> dict[str, np.ndarray]:
        """Return what was computed, images as NCHW, before the running statistics move on."""
        self.forward()
        self.backward()
        found = {
            "y": self.y,
            "gx": self.x.grad,
            "gweight": self.weight.grad,
            "gbias": self.bias.grad,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: np.array(tensor.detach().numpy()) for name, tensor in found.items()}


class TinygradBatchNorm(BatchNorm):
    def start(self, threads: int, **arrays: np.ndarray) -> None:
        import tinygrad_bn as tg

        tg.set_num_threads(threads)
        if self.layout == "NHWC":
            for name in ("x", "g"):
                arrays[name] = np.ascontiguousarray(arrays[name].transpose(0, 2, 3, 1))
        self.x, self.weight, self.bias = (
            tg.tensor(arrays[name], requires_grad=True) for name in ("x", "weight", "bias")
        )
        self.g = tg.tensor(arrays["g"])
        self.running_mean = tg.zeros(self.weight.shape)
        self.running_var = tg.ones(self.weight.shape)

    def apply(self) -> Any:
        from tinygrad_bn import functional as F

        function = F.batch_norm_relu if self.with_relu else F.batch_norm
        return function(
            self.x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=True,
            axis=-1 if self.layout == "NHWC" else 1,
        )

    def results(self) -> dict[str, np.ndarray]:
        found = super().results()
        if self.layout == "NHWC":
            for name in ("y", "gx"):
                found[name] = found[name].transpose(0, 3, 1, 2)
        return found


class BothLayouts(Contender):
    """Forward plus backward of the same sizes with the channels first, and last."""

    phases: ClassVar = ("first", "last")

    def __init__(self, shape: Shape, with_relu: bool, threads: int):
        self.norms = [
            TinygradBatchNorm(layout, shape, with_relu, threads) for layout in ("NCHW", "NHWC")
        ]

    def first(self) -> None:
        self.norms[0].forward()
        self.norms[0].backward()

    def last(self) -> None:
        self.norms[1].forward()
        self.norms[1].backward()


class TorchBatchNorm(BatchNorm):
    def start(self, threads: int, **arrays: np.ndarray) -> None:
        import torch

        torch.set_num_threads(threads)
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        if self.layout == "NHWC":
            for name in ("x", "g"):
                tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
        self.x, self.weight, self.bias = (
            tensors[name].requires_grad_() for name in ("x", "weight", "bias")
        )
        self.g = tensors["g"]
        self.running_mean = torch.zeros(self.weight.shape)
        self.running_var = torch.ones(self.weight.shape)

    def apply(self) -> Any:
        from torch.nn import functional as F

        y = F.batch_norm(
            self.x, self.running_mean, self.running_var, self.weight, self.bias, training=True
        )
        return F.relu(y) if self.with_relu else y


def check(ours: Remote, theirs: Remote) -> None:
    """Raise AssertionError unless both compute the same."""
    found, expected = ours.ask("results"), theirs.ask("results")
    # ReLU's kink: where rounding decides whether y is 0, the gradient goes with it, and so do the
    # channel's sums.
    on_the_kink = (found["y"] == 0) != (expected["y"] == 0)
    assert on_the_kink.mean() < 1e-4
    channels = on_the_kink.any(axis=tuple(i for i in range(on_the_kink.ndim) if i != 1))
    for name in found:
        # Largest differences seen are 1e-6 of the largest entry; a sum over 10⁵ float32 terms in
        # another order accounts for some 1e-5.
        atol = 1e-4 * np.abs(expected[name]).max()
        apart = np.abs(found[name] - expected[name])
        if name in ("gx", "gweight", "gbias"):
            apart = np.where(on_the_kink if name == "gx" else channels, 0, apart)
        np.testing.assert_array_less(apart, atol, err_msg=name)


def measure(
    layout: str, shape: Shape, with_relu: bool, peers: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Return one row: milliseconds of each library and phase, and the ratios."""
    arguments = (layout, shape, with_relu, options.threads)
    with Remote(TinygradBatchNorm, *arguments, threads=options.threads) as ours:
        if not peers:
            turns = take_turns({"ours": ours}, plan(options, settle=2, count=3))
        else:
            with Remote(TorchBatchNorm, *arguments, threads=options.threads) as theirs:
                check(ours, theirs)
                contenders = {"ours": ours, "PyTorch": theirs}
                turns = take_turns(contenders, plan(options, settle=2, count=3))
    sizes = (shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape
    row: dict[str, Any] = {"layout": layout, "shape": sizes}
    for phase in (*BatchNorm.phases, None):
        name = phase or "both"
        for library, taken in turns.items():
            row[f"{name}, {library}"] = summarize(seconds(taken, phase)).scaled(1e3)
        if peers:
            pair = (seconds(turns[library], phase) for library in ("ours", "PyTorch"))
            row[f"{name}, ratio"] = summarize(ratios(*pair))
    return row


def compare_layouts(shape: Shape, with_relu: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds with the channels first and last, and the ratio last / first."""
    with Remote(BothLayouts, shape, with_relu, options.threads, threads=options.threads) as both:
        turns = take_turns({"both": both}, plan(options, settle=2, count=3))["both"]
    first, last = seconds(turns, "first"), seconds(turns, "last")
    return {
        "sizes": shape,
        "channels first": summarize(first).scaled(1e3),
        "channels last": summarize(last).scaled(1e3),
        "last / first": summarize(ratios(last, first)),
    }


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table for each phase and one for both."""
    print(f"\n{name}, milliseconds in training, float32; ratio: ours / PyTorch")
    for phase in (*BatchNorm.phases, "both"):
        columns = [key for key in rows[0] if key.startswith(f"{phase}, ")]
        print_table(
            ["layout", "shape", *columns],
            [[row["layout"], row["shape"], *(row[column] for column in columns)] for row in rows],
        )


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = parser(__doc__, rounds=30).parse_args()
    report = open_report("batch_norm", options)
    peers = present(["torch"])
    for name, with_relu in (("batch norm", False), ("batch norm and ReLU", True)):
        cases = CASES[1:5:3] if options.quick else CASES
        rows = [measure(*case, with_relu, peers, options) for case in cases]
        show(name, rows)
        report[name] = {"rows": rows, **(summary(name, rows, "both, ratio") if peers else {})}
    for name, with_relu in (("layouts", False), ("layouts, with ReLU", True)):
        shapes = [shape for layout, shape in CASES if layout == "NHWC"]
        rows = [
            compare_layouts(s, with_relu, options) for s in shapes[: 1 if options.quick else None]
        ]
        print(f"\n{name}, forward plus backward, milliseconds in training, float32")
        print_table(list(rows[0]), [list(row.values()) for row in rows])
        report[name] = {"rows": rows, **summary(name, rows, "last / first")}
    close_report(report, options)


def summary(name: str, rows: list[dict[str, Any]], ratio: str) -> dict[str, float]:
    """Return the geometric mean and the worst of the rows' ratios of forward plus backward."""
    medians = [row[ratio].median for row in rows]
    found = {"geometric mean": statistics.geometric_mean(medians), "worst": max(medians)}
    print(
        f"\nForward plus backward of {name}, ratios: geometric mean "
        f"{found['geometric mean']:.2f}, worst {found['worst']:.2f}"
    )
    return found


if __name__ == "__main__":
    main()
