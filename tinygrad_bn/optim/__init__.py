"""Optimizers, which update parameters in place, and schedules of their learning rate."""

from tinygrad_bn.optim.adam import Adam, AdamW
from tinygrad_bn.optim.optimizer import Optimizer
from tinygrad_bn.optim.schedule import CosineSchedule, OneCycle, Schedule
from tinygrad_bn.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "CosineSchedule", "OneCycle", "Optimizer", "Schedule"]
