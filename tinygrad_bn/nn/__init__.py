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
from tinygrad_bn.nn.containers import ModuleList, Sequential
from tinygrad_bn.nn.convolution import Conv2d
from tinygrad_bn.nn.io import load, save
from tinygrad_bn.nn.linear import Linear
from tinygrad_bn.nn.module import Module, StateDictError
from tinygrad_bn.nn.parameter import Parameter
from tinygrad_bn.nn.pooling import AvgPool2d, MaxPool2d

__all__ = [
    "AvgPool2d",
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv2d",
    "Dropout",
    "Flatten",
    "Identity",
    "Linear",
    "MaxPool2d",
    "Module",
    "ModuleList",
    "Parameter",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Softmax",
    "StateDictError",
    "Tanh",
    "init",
    "load",
    "save",
]
