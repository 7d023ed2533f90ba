"""Batch norm and the tutorial's training step on a GPU, beside PyTorch and JAX where they are.

Needs CuPy and a GPU; PyTorch and JAX are measured if they are installed and see the GPU. Every
result is checked before it is timed. Batch norm: median of CUDA events, with the second-level cache
flushed before each run, beside the floor: the bytes of 3 passes over x forward and 5 backward, at
the speed at which this GPU was seen to copy. Steps: median of events (JAX: of the host's clock,
waiting for the result, since its streams are its own), no flush. Everything is float32 without
TF32 unless --tf32 is given or another dtype is named.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick             few rounds, small shapes first, no file
    python benchmarks/gpu.py --norms 256x20      only batch norms whose name holds this

Written are benchmarks/results/gpu.json and gpu.png, a roofline.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import _checkout  # noqa: F401  (before tinygrad_bn)
import numpy as np
from _gpu import NORM_HEADERS, NORMS, Norm, disagreement, draw_roofline, norm_rows

import tinygrad_bn as tg
from tinygrad_bn import functional as F
from tinygrad_bn.backend import cuda

RESULTS = Path(__file__).parent / "results"
OURS = "tinygrad_bn"
EPS = 1e-5
#: Largest differences to the formula in float64, relative to the largest entry; roundings of sums
#: in float32, and of results in half precision. bfloat16 keeps 8 bits, and 2⁻⁸ is 4e-3.
TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1.6e-2}
#: Bytes that are copied to see how fast the memory is, and at least written to flush the cache.
COPIED, FLUSHED = 1 << 30, 1 << 28
STEP_TOLERANCE = 3e-2  # see training_step.py: ReLUs and pooling windows that rounding decides


class Clock:
    """Times work on the default stream by events, after flushing the second-level cache."""

    def __init__(self, cupy: Any, rounds: int):
        self.cupy = cupy
        self.rounds = rounds
        size = cupy.cuda.Device().attributes["L2CacheSize"]
        self.junk = cupy.empty(max(4 * size, FLUSHED), "uint8")
        self.start, self.end = cupy.cuda.Event(), cupy.cuda.Event()

    def once(self, run: Callable[[], Any], flush: bool) -> float:
        """Return the milliseconds of one run."""
        if flush:
            self.junk.fill(1)
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(self.start, self.end))

    def in_turns(self, runs: dict[str, Callable[[], Any]], flush: bool = True) -> dict[str, float]:
        """Return the median milliseconds of each, taken A B A B, after five rounds untimed."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(-5, self.rounds):
            for name, run in runs.items():
                taken = self.once(run, flush)
                if i >= 0:
                    times[name].append(taken)
        return {name: statistics.median(taken) for name, taken in times.items()}


def copy_bandwidth(clock: Clock) -> float:
    """Return the bytes a second, read and written, at which the GPU copies a gigabyte."""
    source, target = (clock.cupy.zeros(COPIED // 4, "float32") for _ in range(2))
    taken = clock.in_turns({"copy": lambda: clock.cupy.copyto(target, source)})["copy"]
    return 2 * source.nbytes / taken * 1e3


# --- batch norm ----------------------------------------------------------------------------------


def our_norm(norm: Norm, x: Any, g: Any, weight: Any, bias: Any) -> dict[str, Callable[[], Any]]:
    """Return our forward and backward on CuPy arrays."""
    inputs = [tg.Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    apply = F.batch_norm_relu if norm.relu else F.batch_norm

    def forward() -> Any:
        return apply(inputs[0], None, None, *inputs[1:], True, eps=EPS, axis=norm.axis)

    y, cotangent = forward(), tg.Tensor(g)
    return {
        "forward": forward,
        "backward": lambda: tg.grad(y, inputs, cotangent, retain_graph=True),
    }


def torch_norm(
    norm: Norm, x: Any, g: Any, weight: Any, bias: Any, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """Return PyTorch's on the same memory; images channels last are permuted views, as its users
    have them."""
    import torch

    order = (0, x.ndim - 1, *range(1, x.ndim - 1)) if norm.axis == -1 and x.ndim > 2 else None

    def shared(array: Any) -> Any:
        if norm.dtype == "bfloat16" and str(array.dtype) == "bfloat16":
            made = torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
        else:
            made = torch.from_dlpack(array)
        return made.permute(order) if order and made.ndim == x.ndim else made

    inputs = [shared(a).detach().requires_grad_() for a in (x, weight, bias)]
    cotangent = shared(g)

    def apply(x: Any, weight: Any, bias: Any) -> Any:
        y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, eps=EPS)
        return torch.relu(y) if norm.relu else y

    function = torch.compile(apply) if compiled else apply
    y = function(*inputs)
    return {
        "forward": lambda: function(*inputs),
        "backward": lambda: torch.autograd.grad(y, inputs, cotangent, retain_graph=True),
    }


def formula(norm: Norm, x: Any, g: Any, weight: Any, bias: Any, channel: int) -> list[Any]:
    """Return y and gx of one channel, by the formula in float64 on the host."""
    x, g = (np.take(a, channel, axis=norm.axis).astype(np.float64) for a in (x, g))
    x_hat = (x - x.mean()) / np.sqrt(x.var() + EPS)
    y = weight[channel] * x_hat + bias[channel]
    if norm.relu:
        g = np.where(y > 0, g, 0)
        y = np.maximum(y, 0)
    s = weight[channel] / np.sqrt(x.var() + EPS)
    return [y, s * (g - g.mean() - x_hat * (g * x_hat).mean())]


def check_norm(norm: Norm, runs: dict[str, Any], arrays: list[Any]) -> float:
    """Return how far a library is from the formula, on two channels; AssertionError if too far."""
    y, (gx, *_) = runs["forward"](), runs["backward"]()
    found, expected = [], []
    host = [a.get() for a in arrays]
    axis = norm.axis
    for channel in (0, len(host[2]) - 1):
        expected += formula(norm, *host, channel)
        for value in (y, gx):
            if hasattr(value, "detach") and not isinstance(value, tg.Tensor):  # PyTorch's: NCHW
                found.append(value.detach()[:, channel].double().cpu().numpy())
            else:
                found.append(np.take(value.numpy(), channel, axis=axis).astype(np.float64))
    # PyTorch's views put the channels first, which leaves the order of the rest as it is.
    worst = disagreement(found, expected)
    if not worst <= TOLERANCE[norm.dtype]:
        raise AssertionError(f"{norm.name}: off by {worst:.1e} of the largest entry")
    return worst


def measure_norm(clock: Clock, norm: Norm, torch: bool) -> dict[str, dict[str, float]]:
    """Return milliseconds by phase and library."""
    cupy = clock.cupy
    rng = cupy.random.default_rng(0)
    channels = norm.shape[norm.axis]
    dtype = tg.zeros(1, dtype=norm.dtype).dtype

    def draw(shape: Any) -> Any:
        return rng.standard_normal(shape, dtype="float32")

    arrays = [draw(norm.shape).astype(dtype), draw(norm.shape).astype(dtype)]
    arrays += [draw(channels), draw(channels)]
    contenders = {OURS: our_norm(norm, *arrays)}
    if torch:
        contenders["torch"] = torch_norm(norm, *arrays, compiled=False)
        contenders["compile"] = torch_norm(norm, *arrays, compiled=True)
    for runs in contenders.values():
        check_norm(norm, runs, arrays)
    return {
        phase: clock.in_turns({name: runs[phase] for name, runs in contenders.items()})
        for phase in ("forward", "backward")
    }


# --- training steps ------------------------------------------------------------------------------


def measure_steps(clock: Clock, batch: int, libraries: set[str]) -> dict[str, float]:
    """Return the median milliseconds of a step of the tutorial's network, by library, NCHW."""
    from _gpu_steps import STEPS
    from _steps import draw_batch, draw_noise, start_values

    contenders: dict[str, Any] = {}
    for name, (package, step) in STEPS.items():
        if package in libraries:
            contenders[name] = step(start_values(), "NCHW", 1)
    expected: dict[str, Any] = {}
    for name, contender in contenders.items():
        contender.load(*draw_noise(batch))
        found = contender.results()
        expected = expected or found
        keys = sorted(expected)
        if sorted(found) != keys:
            raise AssertionError(f"{name} computes {sorted(found)}, we {keys}")
        off = disagreement([found[k] for k in keys], [expected[k] for k in keys])
        if not off <= STEP_TOLERANCE:
            raise AssertionError(f"{name}: another step, off by {off:.1e} of the largest entry")
    for contender in contenders.values():
        contender.load(*draw_batch(batch))
    events = {name: c.run for name, c in contenders.items() if c.by_events}
    times = clock.in_turns(events, flush=False)
    for name in contenders.keys() - events.keys():
        times[name] = by_host(contenders[name].run, clock.rounds)
    return times


def by_host(run: Callable[[], Any], rounds: int) -> float:
    """Return the median milliseconds of a run that waits for its result, by the host's clock."""
    times = []
    for i in range(-5, rounds):
        begin = perf_counter()
        run()
        if i >= 0:
            times.append((perf_counter() - begin) * 1e3)
    return statistics.median(times)


# --- the command ---------------------------------------------------------------------------------


def usable() -> set[str]:
    """Return the libraries that are installed and see a GPU."""
    found = {OURS}
    try:
        import torch

        found |= {"torch"} if torch.cuda.is_available() else set()
    except ImportError:
        pass
    try:
        import jax

        found |= {"jax"} if any(d.platform in ("gpu", "cuda") for d in jax.devices()) else set()
    except (ImportError, RuntimeError):
        pass
    return found


def set_precision(libraries: set[str], tf32: bool) -> None:
    """Have the other libraries compute in float32 or TF32, as asked for."""
    if "torch" in libraries:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    if "jax" in libraries:
        import jax

        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 0 also where there is no GPU, after saying so."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--quick", action="store_true", help="few rounds, no file")
    flags.add_argument("--rounds", type=int, default=50, help="(default: %(default)s)")
    flags.add_argument("--norms", default="", help="only those whose name holds this text")
    flags.add_argument("--batches", type=int, nargs="*", default=[256, 4096], help="of the steps")
    flags.add_argument("--tf32", action="store_true", help="let products round to TF32")
    flags.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = flags.parse_args(arguments)
    reason = cuda.unavailable_because()
    if reason is not None:
        print(f"Nothing measured, there is no GPU to measure: {reason}")
        return 0
    import cupy

    clock = Clock(cupy, 5 if options.quick else options.rounds)
    libraries = usable()
    set_precision(libraries, options.tf32)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    bandwidth = copy_bandwidth(clock)
    precision = "TF32" if options.tf32 else "float32"
    print(f"{name}: copies {bandwidth / 1e9:.0f} GB/s; products in {precision}; CuPy")
    print(f"{cupy.__version__}; measured: {', '.join(sorted(libraries))}", flush=True)
    from _report import print_table

    with tg.allow_tf32(options.tf32):
        norms = {}
        for norm in NORMS:
            if options.norms in norm.name:
                norms[norm.name] = measure_norm(clock, norm, "torch" in libraries)
        print_table(NORM_HEADERS, norm_rows(norms, bandwidth))
        steps = {str(b): measure_steps(clock, b, libraries) for b in options.batches}
        contenders = list(dict.fromkeys(name for times in steps.values() for name in times))
        rows = [
            [b, *(f"{t[c]:.3f}" if c in t else "" for c in contenders)] for b, t in steps.items()
        ]
        print_table(["step ms, batch", *contenders], rows)
    if options.quick:
        return 0
    report = {"device": name, "precision": precision, "copy bytes/s": bandwidth, "norms": norms}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**report, "steps": steps}, indent=1) + "\n")
    draw_roofline(norms, bandwidth, name, options.output.with_suffix(".png"))
    print(f"\nWrote {options.output} and its .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
