"""Chains of ops that run as one where a kernel serves them.

A network spends most of its time in runs such as convolution, batch norm, ReLU, max pool. Each op
by itself writes its whole output to memory for the next to read; a kernel for the chain keeps a few
images in cache from the first to the last.

The definition of such an op is the chain, in ordinary ops, and so is its derivative: the rule runs
the chain again on the tape and walks back. That is right at any order and costs the chain twice,
so callers ask `served` first and, where no kernel answers, run the ops themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tinygrad_bn.autograd import grad
from tinygrad_bn.backend import array_module, saving
from tinygrad_bn.domain import Domain, Real, case
from tinygrad_bn.grad_mode import enable_grad
from tinygrad_bn.op import op
from tinygrad_bn.ops.batch_norm import Axes, batch_norm
from tinygrad_bn.ops.convolution import conv2d
from tinygrad_bn.ops.elementwise import relu
from tinygrad_bn.ops.pooling import max_pool2d
from tinygrad_bn.tape import TensorBase, new_tensor
from tinygrad_bn.windows import LAYOUTS, Pair


def differentiate(
    chain: Callable, inputs: Sequence[Any], g: Any, needs: Sequence[bool]
) -> tuple[Any, ...]:
    """Return the cotangents of `inputs` (None where not needed) by the tape on `chain(*inputs)`.

    g: the cotangent of its output. Raw arrays give raw arrays; Tensors give Tensors that can be
        differentiated in their turn.
    """
    as_tensors = isinstance(g, TensorBase)
    with enable_grad():
        # Each input as a place of its own: where one was computed from another, what flows between
        # the two is not this op's affair.
        own = [
            x if x is None else _place_of_its_own(x, needed)
            for x, needed in zip(inputs, needs, strict=True)
        ]
        out = chain(*own)
        wanted = [x for x, needed in zip(own, needs, strict=True) if needed]
        found = iter(grad(out, wanted, g, create_graph=as_tensors))
    grads = (next(found) if needed else None for needed in needs)
    return tuple(x.data if x is not None and not as_tensors else x for x in grads)


def _place_of_its_own(x: Any, needed: bool) -> Any:
    if isinstance(x, TensorBase):
        return x.reshape(x.shape) if needed else x  # pyrefly: ignore
    tensor = new_tensor(x)
    tensor.requires_grad = needed
    return tensor


def _zeros(g: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Return zeros where `g` is: a Tensor if that is one."""
    if isinstance(g, TensorBase):
        return new_tensor(array_module(g.data).zeros(shape, dtype=dtype))
    return array_module(g).zeros(shape, dtype=dtype)


# --- batch norm and ReLU -------------------------------------------------------------------------


def _norm_relu(x: Any, weight: Any, bias: Any, residual: Any, axis: Axes, eps: float) -> Any:
    y, found = batch_norm.call_with_residuals(x, weight, bias, axis=axis, eps=eps)
    return relu(y if residual is None else y + residual), found


@op(
    domain=Domain(
        inputs=(Real(), Real(), Real(), Real()),
        cases=(
            case((6, 3), (3,), (3,), None, axis=(1,), eps=1e-3),
            case((3, 2, 3, 2), (2,), (2,), (3, 2, 3, 2), axis=(1,), eps=1e-3),
            case((3, 2, 2, 3), None, (3,), None, axis=(3,), eps=1e-3),
        ),
    )
)
def batch_norm_relu(
    x: Any, weight: Any = None, bias: Any = None, residual: Any = None, *, axis: Axes, eps: float
) -> Any:
    """Return max(batch_norm(x) + residual, 0), in the dtype of x.

    residual: of x's shape, or None for 0. The rest, and the residuals `mean`, `var` and `count`, as
    of `batch_norm`.
    """
    out, found = _norm_relu(x, weight, bias, residual, axis, eps)
    return saving(out, mean=found["mean"], var=found["var"], count=found["count"])


@batch_norm_relu.def_vjp
def _(
    g: Any,
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    mean: Any,
    var: Any,
    axis: Axes,
    eps: float,
    needs: tuple[bool, ...],
) -> Any:
    def chain(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
        return _norm_relu(x, weight, bias, residual, axis, eps)[0]

    return differentiate(chain, (x, weight, bias, residual), g, needs)


batch_norm_relu.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_batch_norm_relu",
    cuda="tinygrad_bn.kernels.cuda.batch_norm_relu",
)


# --- convolution, batch norm, ReLU, max pool -----------------------------------------------------


def _conv_block(
    x: Any,
    kernel: Any,
    weight: Any,
    bias: Any,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
) -> Any:
    y = conv2d(x, kernel, stride=stride, padding=padding, dilation=dilation, layout=layout)
    y, found = _norm_relu(y, weight, bias, None, (LAYOUTS[layout][3],), eps)
    return y if pool is None else max_pool2d(y, kernel_size=pool, layout=layout), found


_BLOCK = {"eps": 1e-2, "stride": 1, "padding": 0, "dilation": 1, "pool": None, "layout": "NCHW"}


def _block_case(*shapes: Any, **options: Any) -> Any:
    return case(*shapes, **{**_BLOCK, **options})


# A kernel or a γ near 0 makes all entries of the pool's windows tie, or nearly.
_CLEAR = Real(kinks=(0.0,))


@op(
    domain=Domain(
        inputs=(Real(), _CLEAR, Real(), _CLEAR, Real()),
        cases=(
            _block_case((2, 1, 7, 6), (2, 1, 3, 2), None, (2,), (2,), pool=2),
            _block_case((2, 5, 6, 2), (3, 2, 2, 2), (3,), (3,), (3,), pool=(2, 1), layout="NHWC"),
            _block_case((3, 2, 4, 4), (2, 2, 3, 3), None, None, (2,), stride=2, padding=1),
        ),
    )
)
def conv_block(
    x: Any,
    kernel: Any,
    offset: Any = None,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
) -> Any:
    """Return max_pool2d(relu(batch_norm(conv2d(x, kernel) + offset))), in the dtype of x.

    kernel, offset: weight and bias of the convolution (of one group), as `conv2d` takes them. What
        is added to all of a channel is taken off again with its mean: offset enters `mean` alone,
        and its gradient is 0.
    weight, bias: gammas and betas of the norm, whose channels are those of `layout`.
    pool: the size of the pool's windows, which stand side by side; None for no pool.

    Residuals: `mean`, `var` and `count` as of `batch_norm`, of what the convolution gives; `kept`,
    what a kernel keeps for itself.
    """
    out, found = _conv_block(x, kernel, weight, bias, eps, stride, padding, dilation, pool, layout)
    mean = found["mean"]
    mean = mean if offset is None else mean + offset.reshape(mean.shape)
    return saving(out, mean=mean, var=found["var"], count=found["count"], kept=None)


@conv_block.def_vjp
def _(
    g: Any,
    x: Any,
    kernel: Any,
    offset_dtype: Any,  # not the offset: as with a convolution by itself, it may be written to
    weight: Any,
    bias: Any,
    var: Any,
    kept: Any,
    eps: float,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: Pair | None,
    layout: str,
    needs: tuple[bool, ...],
) -> Any:
    def chain(x: Any, kernel: Any, weight: Any, bias: Any) -> Any:
        return _conv_block(x, kernel, weight, bias, eps, stride, padding, dilation, pool, layout)[0]

    others = (*needs[:2], *needs[3:])
    gx, gkernel, gweight, gbias = differentiate(chain, (x, kernel, weight, bias), g, others)
    goffset = _zeros(g, kernel.shape[:1], offset_dtype) if needs[2] else None
    return gx, gkernel, goffset, gweight, gbias


conv_block.use_kernels(
    numba="tinygrad_bn.kernels.cpu.numba_conv_block",
    cuda="tinygrad_bn.kernels.cuda.conv_block",
)
