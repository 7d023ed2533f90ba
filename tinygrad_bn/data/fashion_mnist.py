"""Fashion-MNIST: 70,000 grey pictures of clothes, 28 x 28 pixels, in ten classes.

Source: Xiao, Rasul & Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms", https://arxiv.org/abs/1708.07747. Copyright 2017 Zalando SE, MIT licence; its
text is in FASHION_MNIST_LICENSE.txt beside this file.
"""

from __future__ import annotations

import os

import numpy as np

from tinygrad_bn.data.idx import parse_idx

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# File -> SHA-256 of its decompressed contents, in the order of the returned arrays.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# Upstream's host speaks no https; the hashes make that harmless.
MIRRORS = (
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"  # where PACKAGE is installed
PACKAGE = "dataset-fashion-mnist"
SAMPLE = "fashion_mnist_sample.npz"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def fashion_mnist(root: str | os.PathLike[str] | None = None, *, download: bool = True) -> Arrays:
    """Return `(train_images, train_labels, test_images, test_labels)` of Fashion-MNIST.

    Images: uint8 of 0 to 255, `(60000, 28, 28)` and `(10000, 28, 28)`; labels: uint8 of 0 to 9,
    `(60000,)` and `(10000,)`, with names in `FASHION_MNIST_CLASSES`.

    The four idx files, plain or `.gz`, are looked for in `root`; in `fashion-mnist` below the
    cache folder (`TINYGRAD_BN_DATA`, else `$XDG_CACHE_HOME/tinygrad_bn` or the platform's like);
    in `/usr/share/datasets/fashion-mnist`. With `download`, they are then fetched from upstream's
    mirrors, at last from the distribution's package through apt (nothing is installed), and kept
    in `root` if it is given, else in the cache. Every payload is checked against its SHA-256.

    Raises DatasetCorruptError if a file in `root` is wrong: who names a folder wants to know. In
    the other folders such a file is passed over with a warning, and a download replaces it.
    Raises DatasetNotFoundError, a FileNotFoundError, if no place has the files: it lists each place
    with its reason. `fashion_mnist_sample()` always works.

    >>> try:
    ...     train_images, train_labels, test_images, test_labels = fashion_mnist(download=False)
    ... except FileNotFoundError:
    ...     train_images, train_labels, test_images, test_labels = fashion_mnist_sample()
    >>> train_images.shape[1:], train_images.dtype
    ((28, 28), dtype('uint8'))
    """
    # Imported here: these load ssl, subprocess and more, which `import tinygrad_bn` need not.
    from pathlib import Path

    from tinygrad_bn.data.files import cache_directory
    from tinygrad_bn.data.search import Search

    chosen = [] if root is None else [Path(root).expanduser()]
    cache = cache_directory() / "fashion-mnist"
    search = Search(FILES)
    for folder in chosen:
        search.in_folder(folder, strict=True)
    for folder in (cache, Path(SYSTEM_FOLDER)):
        if search.missing:
            search.in_folder(folder)
    if search.missing and download:
        search.online(MIRRORS, PACKAGE, [*chosen, cache])
    elif search.missing:
        search.tried.append(("the network", "not tried, because of download=False"))
    payloads = search.result("fashion_mnist:", _advice(cache))
    images, labels, test_images, test_labels = (parse_idx(payloads[n], n) for n in FILES)
    return images, labels, test_images, test_labels


def fashion_mnist_sample() -> Arrays:
    """Return a small real part of Fashion-MNIST that ships with the package.

    Shaped and typed as `fashion_mnist()`, with 2,000 training images (200 of each class) and 500
    test images (50 of each class), in upstream's order. `make_sample.py` tells how it was drawn.

    >>> train_images, train_labels, test_images, test_labels = fashion_mnist_sample()
    >>> train_images.shape, test_labels.shape
    ((2000, 28, 28), (500,))
    >>> np.bincount(test_labels).tolist()
    [50, 50, 50, 50, 50, 50, 50, 50, 50, 50]
    """
    with np.load(os.path.join(os.path.dirname(__file__), SAMPLE)) as sample:
        return (
            sample["train_images"],
            sample["train_labels"],
            sample["test_images"],
            sample["test_labels"],
        )


def _advice(cache: os.PathLike[str]) -> str:
    """Return what a user can do who has got no data."""
    return (
        f"  - with a network: call it again; the files will be kept in {cache}\n"
        f"  - without: put the files {', '.join(FILES)} (plain or .gz) there, or into a folder\n"
        "    that you pass as `root` (TINYGRAD_BN_DATA names another cache folder)\n"
        f"  - on Debian or Ubuntu: sudo apt-get install {PACKAGE}\n"
        "  - or begin with fashion_mnist_sample(), a small real part that ships with this package"
    )
