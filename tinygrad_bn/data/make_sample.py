"""How `fashion_mnist_sample.npz` was made: `python -m tinygrad_bn.data.make_sample [--root DIR]`.

From Fashion-MNIST's training images 200 of each class, from its test images 50 of each class, drawn
without replacement with a fixed seed and kept in upstream's order. `train_index` and `test_index`
in the file say which they are.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_bn.data.fashion_mnist import SAMPLE, fashion_mnist

SEED = 0
TRAIN_PER_CLASS = 200
TEST_PER_CLASS = 50


def stratified_index(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the sorted positions of `per_class` randomly drawn members of each class.

    labels: (N,) integers. Raises ValueError where a class has fewer members.

    >>> stratified_index(np.array([1, 0, 1, 0]), 2, seed=0)
    array([0, 1, 2, 3])
    """
    # RandomState: NumPy promises that its numbers never change, which Generator does not.
    random = np.random.RandomState(seed)
    drawn = [
        random.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(drawn))


def make_sample(root: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return the arrays of the sample by name. `root`, errors: as `fashion_mnist`."""
    train_images, train_labels, test_images, test_labels = fashion_mnist(root)
    train = stratified_index(train_labels, TRAIN_PER_CLASS, SEED)
    test = stratified_index(test_labels, TEST_PER_CLASS, SEED)
    return {
        "train_images": train_images[train],
        "train_labels": train_labels[train],
        "test_images": test_images[test],
        "test_labels": test_labels[test],
        "train_index": train.astype(np.uint16),
        "test_index": test.astype(np.uint16),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample to the file that `--out` names, in this folder if it is not given."""
    parser = argparse.ArgumentParser(description="Write the sample of Fashion-MNIST.")
    parser.add_argument("--root", help="folder with the four idx files")
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), SAMPLE))
    chosen = parser.parse_args(arguments)
    np.savez_compressed(chosen.out, **make_sample(chosen.root))
    print(f"{chosen.out}: {os.path.getsize(chosen.out):,} bytes")


if __name__ == "__main__":
    main()
