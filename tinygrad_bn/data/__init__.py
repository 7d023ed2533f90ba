"""Data: Fashion-MNIST, whole or as a small real sample, and a loader of shuffled mini-batches.

    train_images, train_labels, test_images, test_labels = data.fashion_mnist()
    loader = data.DataLoader((train_images, train_labels), 256, shuffle=True, seed=0)
    for images, labels in loader: ...

Importing this room loads NumPy only; what reads files and the network loads at its first use.
"""

from tinygrad_bn.data.errors import DatasetCorruptError, DatasetNotFoundError
from tinygrad_bn.data.fashion_mnist import (
    FASHION_MNIST_CLASSES,
    fashion_mnist,
    fashion_mnist_sample,
)
from tinygrad_bn.data.idx import parse_idx
from tinygrad_bn.data.loader import DataLoader

__all__ = [
    "FASHION_MNIST_CLASSES",
    "DataLoader",
    "DatasetCorruptError",
    "DatasetNotFoundError",
    "fashion_mnist",
    "fashion_mnist_sample",
    "parse_idx",
]
