"""Faults planted in the text of the network's CUDA kernels: a few fixed inputs find each one out.

A fault that these did not see could live in the kernels. None of the faults writes out of bounds,
which would take the tests down with it.
"""

import numpy as np
import pytest

import tinygrad_bn as tg
from tests.kernels.cuda import shim
from tests.kernels.cuda.test_batch_norm_faults import unwritten as nan
from tinygrad_bn import nn, optim
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import convolutions, cross_entropy, images, launch, optimizers
from tinygrad_bn.ops.convolution import conv2d
from tinygrad_bn.ops.fused import conv_block
from tinygrad_bn.ops.loss import cross_entropy as cross_entropy_op
from tinygrad_bn.ops.pooling import avg_pool2d, max_pool2d

pytestmark = pytest.mark.skipif(shim.missing() is not None, reason=str(shim.missing()))

#: As much shared memory as every GPU gives a block.
DEVICE = shim.DEVICE._replace(shared=3 * 49152, shared_per_block=49152)


def unwritten(shape, dtype=float):
    """Return what `empty` does, but NaN: never what another run left there."""
    return nan((1,), dtype).reshape(()) if shape == () else nan(shape, dtype)


def both(op, *arrays, **options):
    """Return the output of an op and the gradients of all its inputs that are floating."""
    tensors = [tg.tensor(a, requires_grad=a.dtype.kind == "f") for a in arrays]
    y = op(*tensors, **options)
    y.backward(tg.tensor(np.asarray(np.random.default_rng(9).normal(size=y.shape), "f")))
    return [y.numpy(), *(t.grad.numpy() for t in tensors if t.requires_grad)]


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("f") for shape in shapes]


def run_convolution():
    x, weight, bias = normal((9, 3, 9, 7), (10, 3, 3, 2), (10,))
    found = []
    for options in ({"padding": 1, "dilation": (1, 2)}, {"stride": (2, 3), "padding": (2, 1)}):
        found += both(conv2d, x, weight, bias, **options)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    return found + both(conv2d, last, weight, bias, padding=1, layout="NHWC")


def run_block():
    x, kernel, offset, gamma, beta = normal((9, 2, 9, 8), (6, 2, 2, 3), (6,), (6,), (6,))
    x = x + np.float32(30)
    options = {"eps": 1e-2, "stride": 1, "padding": 0, "dilation": 1, "pool": (2, 3)}
    arrays = x, kernel, offset, gamma, beta
    y, found = conv_block.call_with_residuals(*arrays, **options, layout="NCHW")
    grads = both(conv_block, *arrays, **options, layout="NCHW")
    del grads[3]  # of the offset: 0 within rounding
    return [y, found["mean"], found["var"], *grads]


def run_pools():
    (x,) = normal((2, 3, 9, 8))
    x = np.round(x)  # with equal entries
    options = {"kernel_size": 3, "stride": 2, "padding": 1}
    mean = both(avg_pool2d, x, count_include_pad=False, **options)
    return both(max_pool2d, x, **options) + mean + both(avg_pool2d, x, **options)


def run_loss():
    logits, other, probabilities = normal((70, 40), (6, 5, 7), (6, 5, 7))
    labels = np.random.default_rng(1).integers(0, 40, 70)
    found = both(cross_entropy_op, logits + 90, labels)
    return found + both(cross_entropy_op, other, np.abs(probabilities), reduction="none")


def run_optimizers():
    found = []
    for make in (
        lambda p: optim.SGD(p, 0.1, 0.9, 0.1, nesterov=True),
        lambda p: optim.AdamW(p, 0.1),
        lambda p: optim.Adam(p, 0.1, weight_decay=0.1),
    ):
        parameters = [nn.Parameter(a) for a in normal(*[(n,) for n in (150, 1, 64, 3)] * 5)]
        optimizer = make(parameters)
        for k in range(3):
            for i, p in enumerate(parameters):
                g = np.random.default_rng(50 * k + i).normal(size=p.shape)
                p.grad = tg.tensor(g, dtype="float32")
            optimizer.step()
        found += [p.numpy() for p in parameters]
    return found


def difference(run, backwards=False):
    """Return how far the kernels are from the generic form, relative to the largest entry."""
    with use_kernels("generic"):
        want = run()
    runtime = shim.ShimRuntime(DEVICE, backwards)
    with shim.small_tiles(), shim.on_cuda_kernels(runtime), pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (images, "THREADS", 64),
            (cross_entropy, "THREADS", 64),
            (optimizers, "THREADS", 32),
            (optimizers, "CHUNK", 64),
            (convolutions, "PIXELS", 2),
            (convolutions, "FEWEST_PIXELS", 64),
            (convolutions, "TOTAL_WARPS", 2),
            (np, "empty", unwritten),
        ):
            patch.setattr(module, name, value)
        got = run()
    worst = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(got, want, strict=True)]
    return float(np.nan_to_num(np.max(worst), nan=np.inf))


RUNS = [run_convolution, run_block, run_pools, run_loss, run_optimizers]
#: The block's x has a mean of 30 times its spread, which float32 sums of a window round.
BAR = {run_block: 1e-4}


@pytest.mark.parametrize("run", RUNS)
def test_the_kernels_as_they_are_agree(run):
    assert difference(run) < BAR.get(run, 1e-5)


#: What is replaced by what, and where it shows.
FAULTS = {
    "a window that begins without its padding": (
        "row = r * reach.step_row + reach.origin_row;",
        "row = r * reach.step_row;",
        run_convolution,
    ),
    "rows beyond the image read": (
        "(unsigned)r < (unsigned)images.rows &&",
        "r < images.rows &&",
        run_convolution,
    ),
    "entries between the strides taken for entries": (
        "if (quotient_row * reach.apart_row != r || quotient_column * reach.apart_column != c) "
        "return 0;",
        "",
        run_convolution,
    ),
    "the last taps left out": (
        "begin < taps; begin += DEPTH",
        "begin + DEPTH <= taps; begin += DEPTH",
        run_convolution,
    ),
    "no barrier before the taps are read": (
        "from, reach);\n  }\n  __syncthreads();\n\n  constexpr",
        "from, reach);\n  }\n\n  constexpr",
        run_convolution,
    ),
    "the buffer that is read filled": ("keep(buffer ^ 1)", "keep(buffer)", run_convolution),
    "no barrier between the steps": (
        "before the last barrier\n    __syncthreads();",
        "before the last barrier",
        run_convolution,
    ),
    "no bias": ("(bias ? bias[channel] : 0)", "0", run_convolution),
    "no barrier before a share's next pixels": (
        "__syncthreads();  // the last 32 pixels",
        "// the last 32 pixels",
        run_convolution,
    ),
    "no carry into the next row": (
        "column -= y.columns;\n      ++row;",
        "column -= y.columns;",
        run_convolution,
    ),
    "no carry into the next image": (
        "row -= y.rows;\n      ++image;",
        "row -= y.rows;",
        run_convolution,
    ),
    "the last share left out": (
        "share < shares; share += lanes",
        "share < shares - 1; share += lanes",
        run_convolution,
    ),
    "the last of equal entries": ("entry > best ||", "entry >= best ||", run_pools),
    "padding counted": ("if (with_padding) return", "if (true) return", run_pools),
    "the window's mean over its whole size": (
        "max(first, 0)));",
        "first));",
        run_pools,
    ),
    "sums from every entry of a window": (
        "if (place == NONE) continue;",
        "if (place == NONE) place = 0;",
        run_block,
    ),
    "a cotangent where all are cut off": ("best > 0 ? place : NONE", "place", run_block),
    "rows and columns of the window exchanged": (
        "int i = place / wide, j = place - i * wide;",
        "int j = place / wide, i = place - j * wide;",
        run_block,
    ),
    "the shift forgotten in the mean": ("real(y[c * inner]) + d;", "d;", run_block),
    "the offset forgotten": ("found + added.at(c, 0)", "found", run_block),
    "the x̂ term missing from gy": (
        "double tilt = -slope * sum_gx",
        "double tilt = 0 * sum_gx",
        run_block,
    ),
    "the mean of g left in gy": ("level = -slope * sums[0]", "level = 0 * sums[0]", run_block),
    "the last block's sums left out": (
        "member < members; member += THREADS",
        "member < members - 1; member += THREADS",
        run_block,
    ),
    "the largest logit not taken off": (
        "exp((Real)(real(logits[row.first + c * row.step]) - top))",
        "exp((Real)(real(logits[row.first + c * row.step])))",
        run_loss,
    ),
    "half of the lanes": ("int by = LANES / 2; by > 0", "int by = LANES / 4; by > 0", run_loss),
    "probabilities taken to sum to 1": (
        "sum = sum_over_lanes(sum);\n  }",
        "sum = 1;\n  }",
        run_loss,
    ),
    "the gradient of a sum": ("/ (Real)divisor : 0", ": 0", run_loss),
    "the first block's losses alone": ("k < count; k += THREADS", "k < 1; k += THREADS", run_loss),
    "every chunk the first": ("(chunk - table.end(row - 1)) * CHUNK", "0", run_optimizers),
    "chunks counted from the first parameter": (
        "(chunk - table.end(row - 1)) * CHUNK",
        "chunk * CHUNK",
        run_optimizers,
    ),
    "a chunk that runs on": (
        "min(table.size(row), begin + CHUNK)",
        "table.size(row)",
        run_optimizers,
    ),
    "one state for the other": (
        "(E*)at[2 * rows], (E*)at[3 * rows]",
        "(E*)at[3 * rows], (E*)at[2 * rows]",
        run_optimizers,
    ),
    "no velocity where there is one": (
        "of.first[i] = v;\n      g = nest",
        "g = nest",
        run_optimizers,
    ),
    "decay of p by itself": ("g = fma(shrink, p, g);", "g = fma(shrink, g, g);", run_optimizers),
    "no look ahead": ("nesterov ? fma(keep, v, g) : v", "v", run_optimizers),
    "no correction of the second average": ("sqrt(v) / correction", "sqrt(v)", run_optimizers),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_out(name, monkeypatch):
    right, wrong, run = FAULTS[name]
    source = launch.source
    planted = []

    def faulty(file, **defines):
        text = source(file, **defines)
        planted.append(right in text)
        return text.replace(right, wrong)

    monkeypatch.setattr(launch, "source", faulty)
    try:
        found = max(difference(run, backwards) for backwards in (False, True))
    except shim.DeadlockError:
        found = np.inf
    assert any(planted), "the text has changed: plant the fault anew"
    assert found > BAR.get(run, 1e-5)
