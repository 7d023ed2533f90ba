"""tinygrad_bn: reverse-mode automatic differentiation, and batch normalization done right."""
from tinygrad_bn.autograd import enable_grad, grad, is_grad_enabled, no_grad
from tinygrad_bn.op import op
from tinygrad_bn.tensor import Tensor

def tensor(data, *, dtype=None, device=None, requires_grad=False):
    t = Tensor(data, dtype=dtype, device=device)
    t = t.copy()
    return t.requires_grad_() if requires_grad else t
