"""Layers and networks: Modules with Parameters, their initial values, and their files."""

from tinygrad_bn.nn import init
from tinygrad_bn.nn.activation import (
    Dropout,
    Flatten,
    Identity,
    ReLU,
    Sigmoid,
    Softmax,
    Tanh,
)
from tinygrad_bn.nn.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from tinygrad_bn.nn.batch_renorm import BatchRenorm
from tinygrad_bn.nn.containers import ModuleList, Sequential
from tinygrad_bn.nn.conventions import CONVENTIONS, Convention, convert_running_var
from tinygrad_bn.nn.convolution import Conv2d
from tinygrad_bn.nn.folding import fold_batch_norm
from tinygrad_bn.nn.io import load, save
from tinygrad_bn.nn.linear import Linear
from tinygrad_bn.nn.module import Module, StateDictError
from tinygrad_bn.nn.normalization import (
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.nn.per_channel import recomputing
from tinygrad_bn.nn.pooling import AvgPool2d, MaxPool2d
from tinygrad_bn.nn.population import update_batch_norm

__all__ = [
    "CONVENTIONS",
    "AvgPool2d",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "Conv2d",
    "Convention",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "StateDictError",
    "Tanh",
    "convert_running_var",
    "fold_batch_norm",
    "init",
    "load",
    "recomputing",
    "save",
    "update_batch_norm",
]
