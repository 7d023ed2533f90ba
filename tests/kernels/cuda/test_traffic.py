"""Bytes that the kernels ask of memory: batch norm within the floor, other kernels once over.

Counted at every access of the kernels' own text (see trace.h), on an H100 cut down: 4 of its 132
multiprocessors, and a batch to match, so that a block has as much to do as on the whole one.
"""

import math

import ml_dtypes
import numpy as np
import pytest

from tests.kernels.cuda import shim
from tinygrad_bn.backend.kernels import use_kernels
from tinygrad_bn.kernels.cuda import batch_norm, channel_teams, channel_tiles, launch, optimizers
from tinygrad_bn.kernels.cuda.batch_norm import AFFINE, GRADIENT
from tinygrad_bn.kernels.cuda.channel_teams import RESERVED, RESIDENT, THREADS, Job, plan
from tinygrad_bn.kernels.cuda.channel_tiles import loads_for, view_of
from tinygrad_bn.ops.elementwise import relu
from tinygrad_bn.ops.pooling import max_pool2d

H100 = launch.Device(
    multiprocessors=132, threads=2048, shared=233472, shared_per_block=232448, cooperative=True
)
SMALL = H100._replace(multiprocessors=4)
PASSES = {"forward": 3, "backward": 5}

#: Shape, channel axis, dtype -> passes over x, forward and backward, that an H100 is asked for at
#: most. The least is 2 and 3; what does not stay on the chip is read again.
SHAPES = {
    ((256, 64, 56, 56), 1, "float32"): (2.01, 3.01),
    ((64, 256, 56, 56), 1, "float32"): (2.01, 3.01),
    ((256, 2048, 7, 7), 1, "float32"): (2.11, 3.12),
    ((256, 20, 24, 24), 1, "float32"): (2.01, 3.01),
    ((256, 50, 10, 10), 1, "float32"): (2.01, 3.01),
    ((65536, 1024), 1, "float32"): (2.02, 3.6),
    ((8192, 4096), 1, "float32"): (2.01, 3.01),
    ((256, 56, 56, 64), 3, "float32"): (2.77, 4.78),
    ((64, 56, 56, 256), 3, "float32"): (2.04, 4.08),
    ((256, 7, 7, 2048), 3, "float32"): (2.04, 3.15),
    ((256, 64, 56, 56), 1, "float16"): (2.01, 3.01),
    ((256, 64, 56, 56), 1, "bfloat16"): (2.01, 3.01),
}


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def planned(x, axis, device, kind):
    """Return the plan for an array, and how often it has its tensors read or written, in passes."""
    view = view_of(x, (axis,), 1)
    loads = loads_for(view, (x,))
    tensors, coefficients = {"forward": (1, AFFINE), "backward": (2, GRADIENT)}[kind]
    job = Job(tensors, 2, coefficients, loads.vector * x.itemsize, 4)
    shared = (device.shared // RESIDENT - RESERVED) // 16 * 16
    found = plan(view, loads, job, shared, RESIDENT * device.multiprocessors)
    width = found.tile * view.inner // loads.vector if loads.columns else 1
    share = math.ceil(view.values * found.tile / loads.vector / found.members)
    again = max(0, 1 - found.kept * (THREADS // width * width) / share)
    return found, tensors + 1 + tensors * again


@pytest.mark.parametrize(("case", "most"), SHAPES.items(), ids=[f"{case}" for case in SHAPES])
def test_an_h100_is_asked_for_less_than_the_floor(case, most):
    """By the plan; that kernels move what the plan says, is counted below."""
    shape, axis, dtype = case
    x = np.lib.stride_tricks.as_strided(
        np.zeros(4, dtype_of(dtype)), shape, c_strides(shape, dtype)
    )
    with launch.use_runtime(shim.ShimRuntime(H100)):
        for (kind, floor), limit in zip(PASSES.items(), most, strict=True):
            found, passes = planned(x, axis, H100, kind)
            assert passes <= limit
            # 0.85 of the floor's speed is to be had at this share of the speed of a copy.
            assert passes / (floor / 0.85) < 0.82
            assert found.teams * found.members > 0.9 * RESIDENT * 132


def c_strides(shape, dtype):
    size = dtype_of(dtype).itemsize
    return tuple(size * math.prod(shape[k + 1 :]) for k in range(len(shape)))


@pytest.fixture(scope="module")
def traced():
    if shim.missing() is not None:
        pytest.skip(shim.missing())
    return shim.Traced(SMALL)


def run(traced, x, g, axis, monkeypatch, mask=None):
    """Return how many bytes of x (and g) were read and of y and gx written, over those of x."""
    made = [np.zeros_like(x), np.zeros_like(x)]
    y, gx = made
    monkeypatch.setattr(channel_tiles.View, "empty", lambda view, like: made.pop(0))
    options = {"axis": (axis,), "eps": 1e-5}
    share = lambda: [[round(n / x.nbytes, 3) for n in counts] for counts in traced.moved]  # noqa: E731
    with launch.use_runtime(traced):
        traced.watching(x, y)
        saved = batch_norm.forward(x, None, None, mask, **options).residuals
        forward = share()
        traced.watching(g, x, gx)
        call = g, x, None, None, mask, saved["mean"], saved["var"]
        batch_norm.vjp(*call, **options, groups=1, needs=(True, True, True, False))
        return forward, share()


#: One of each kind; a 32nd of the batch, or of the channels where several make a tile.
COUNTED = [
    ((8, 64, 56, 56), 1, "float32"),
    ((256, 64, 7, 7), 1, "float32"),
    ((8, 20, 24, 24), 1, "float32"),
    ((2048, 1024), 1, "float32"),
    ((8, 56, 56, 64), 3, "float32"),
    ((8, 64, 56, 56), 1, "float16"),
]


@pytest.mark.parametrize(("shape", "axis", "dtype"), COUNTED)
def test_kernels_move_what_the_plan_says(traced, shape, axis, dtype, monkeypatch):
    x, g = np.random.default_rng(0).standard_normal((2, *shape), np.float32).astype(dtype)
    (x_read, y_moved), (g_moved, x_moved, gx_moved) = run(traced, x, g, axis, monkeypatch)
    # A little more of x is read: each thread's value of its channels, from which it measures.
    with launch.use_runtime(traced):
        expected = [planned(x, axis, SMALL, kind)[1] for kind in PASSES]
    assert x_read[0] + 1 == pytest.approx(expected[0], rel=0.03)
    assert g_moved[0] == pytest.approx(x_moved[0], rel=0.03)
    assert g_moved[0] + x_moved[0] + 1 == pytest.approx(expected[1], rel=0.03)
    # Every element of the results is written once, none is read, and inputs are not written.
    assert y_moved == gx_moved == [0, 1]
    assert x_read[1] == g_moved[1] == x_moved[1] == 0


@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 8, 15, 15), 1), ((64, 8, 5, 5), 1), ((999, 33), 1)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_two_launches_are_three_passes_and_five(traced, shape, axis, masked, monkeypatch):
    monkeypatch.setattr(batch_norm, "teams_for", lambda *arguments: None)
    x, g = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    mask = np.ones((shape[0], *[1] * (len(shape) - 1))) if masked else None
    (x_moved, y_moved), backward = run(traced, x, g, axis, monkeypatch, mask)
    assert 2 <= x_moved[0] < 2.3 and x_moved[1] == 0 and y_moved == [0, 1]
    assert backward == [[2, 0], [2, 0], [0, 1]]


def test_an_optimizer_reads_and_writes_each_element_once(traced):
    p, g, first, second = np.random.default_rng(0).random((4, 9000), np.float32)
    with launch.use_runtime(traced):
        traced.watching(p, g, first, second)
        numbers = [None, 0.1, None, 0.5, None, 1.0, 0.1, 0.9, 0.01, 1e-8, 0.0]
        optimizers.run("adam", [(p, g, first, second)], *numbers)
    assert [[n / p.nbytes for n in counts] for counts in traced.moved] == [
        [1, 1],
        [1, 0],
        [1, 1],
        [1, 1],
    ]


@pytest.mark.parametrize("op", [relu, lambda x: max_pool2d(x, kernel_size=2)], ids=["relu", "pool"])
def test_each_element_of_an_image_is_read_once(traced, op):
    x = np.random.default_rng(0).standard_normal((4, 3, 12, 12), np.float32)
    with shim.on_cuda_kernels(traced), use_kernels("cuda"):
        traced.watching(x)
        op(x)
    assert traced.moved == [[x.nbytes, 0]]


def test_a_pass_too_many_is_seen(traced, monkeypatch):
    """Were there less room on the chip than there is, more would be read again."""
    little = lambda *arguments: plan(*arguments)._replace(kept=2)  # noqa: E731
    monkeypatch.setattr(channel_teams, "plan", little)
    x, g = np.random.default_rng(0).standard_normal((2, 8, 20, 24, 24), np.float32)
    (x_moved, _), (g_moved, *_) = run(traced, x, g, 1, monkeypatch)
    assert x_moved[0] > 1.5 and g_moved[0] > 1.5
