"""Batch norm on the GPU: the kit's verification, and the accuracy table of the CPU."""

import numpy as np
import pytest
from hypothesis import given

import tinygrad_bn as tg
from tests.ops.batch_norm_cases import cases, reference
from tinygrad_bn import functional as F
from tinygrad_bn import testing
from tinygrad_bn.tensor import Tensor

#: Errors on the scales of docs/batch_norm.md; half precision is one rounding of the result.
BARS = {"float32": 1e-5, "float64": 1e-11, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def there_and_back(
    x, running_mean=None, running_var=None, weight=None, bias=None, *args, **options
):
    """Return what `F.batch_norm` on the GPU makes of arguments on the host, and moves there."""

    def moved(value):
        return None if value is None else Tensor(value, device="cpu").to("cuda")

    state = running_mean, running_var
    gpu_state = [None if s is None else tg.tensor(s, device="cuda") for s in state]
    if options.get("mask") is not None:
        options["mask"] = moved(options["mask"])
    sent = [v if isinstance(v, Tensor) else moved(v) for v in (x, weight, bias)]
    sent = [v.to("cuda") if isinstance(v, Tensor) else v for v in sent]
    y = F.batch_norm(sent[0], *gpu_state, *sent[1:], *args, **options).cpu()
    for s, there in zip(state, gpu_state, strict=True):
        if s is not None:
            s[...] = there.cpu() if isinstance(s, Tensor) else there.numpy()
    return y if isinstance(x, Tensor) else y.numpy()


def test_the_kits_verification_of_batch_norm(on_gpu):
    with tg.default_device("cpu"):  # what it draws is on the host
        testing.verify_batch_norm(there_and_back, max_examples=60)


@pytest.mark.parametrize(
    ("dtype", "max_offset"),
    [("float32", 1e6), ("float64", 1e3), ("float16", 1.0), ("bfloat16", 1.0)],
)
def test_results_match_the_formula_for_any_axes(on_gpu, dtype, max_offset):
    narrow = tg.zeros(1, dtype=dtype, device="cpu").dtype

    @given(case=cases(np.float64 if dtype == "float64" else np.float32, max_offset))
    def check(case):
        case.x, case.g = case.x.astype(narrow), case.g.astype(narrow)
        x, weight, bias = (
            None if a is None else Tensor(on_gpu.array(a), requires_grad=True)
            for a in (case.x, case.weight, case.bias)
        )
        y = F.batch_norm(x, None, None, weight, bias, True, eps=case.eps, axis=case.axis)
        y.backward(Tensor(on_gpu.array(case.g)))
        got = {"y": y.detach(), "gx": x.grad}
        got |= {} if weight is None else {"gweight": weight.grad}
        got |= {} if bias is None else {"gbias": bias.grad}
        host = {name: value.numpy().astype("float64") for name, value in got.items()}
        assert max(reference(case).errors(**host).values()) < BARS[dtype]
        assert y.dtype == x.grad.dtype == narrow

    check()


SHAPES = {
    "NCHW": ((16, 20, 24, 24), 1),
    "NHWC": ((16, 24, 24, 20), -1),
    "2-D": ((512, 96), 1),
    "small images": ((64, 128, 7, 7), 1),
    "two axes": ((32, 6, 5, 7), (1, 2)),
}


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_masks_and_groups_are_those_of_the_cpu(on_gpu, shape, axis, masked, groups):
    rng = np.random.default_rng(0)
    x, g = rng.normal(3, 2, (2, *shape)).astype("float32")
    kept = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    weight, bias = rng.normal(size=(2, *(shape[a] for a in kept))).astype("float32")
    mask = rng.integers(0, 3, (shape[0], *[1] * (len(shape) - 1))) if masked else None
    results = []
    for device in ("cpu", "cuda"):
        inputs = [tg.tensor(a, device=device, requires_grad=True) for a in (x, weight, bias)]
        running = [tg.zeros_like(inputs[1]), tg.ones_like(inputs[1])]
        options = {"axis": axis, "groups": groups}
        if masked:
            options["mask"] = tg.tensor(mask, device=device)
        y = F.batch_norm(inputs[0], *running, *inputs[1:], True, **options)
        y.backward(tg.tensor(g, device=device))
        results.append([y, *running, *(t.grad for t in inputs)])
    for here, there in zip(*results, strict=True):
        scale = np.abs(here.numpy()).max()
        # float32 roundings of either side's sums, relative to the largest entry
        np.testing.assert_allclose(there.numpy(), here.numpy(), rtol=0, atol=2e-5 * scale)


def test_a_run_is_repeated_to_the_bit(on_gpu):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 64, 32, 14, 14)).astype("float32")
    seen = []
    for _ in range(3):
        t = tg.tensor(x, device="cuda", requires_grad=True)
        w = tg.ones(32, device="cuda", requires_grad=True)
        y = F.batch_norm(t, None, None, w, None, True)
        y.backward(tg.tensor(g, device="cuda"))
        seen.append([y.numpy(), t.grad.numpy(), w.grad.numpy()])
    for again in seen[1:]:
        for a, b in zip(seen[0], again, strict=True):
            np.testing.assert_array_equal(a, b)
