"""The command line of `fashion_mnist.py`: every flag, what it means and what it defaults to."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from _recipes import LAYOUTS, RECIPES

EPILOG = """\
A run leaves in its folder: config.json, metrics.jsonl (a line for every step and every test),
model.safetensors and curves.png (if matplotlib is installed). No run is ever overwritten: if the
folder exists, the next is called NAME-2, NAME-3 and so on."""


def parse(
    arguments: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Return the options that `arguments` (None: the program's own) give.

    defaults: values in place of the usual defaults, for example those of an earlier run.
    """
    parser = _parser()
    parser.set_defaults(**(defaults or {}))
    options = parser.parse_args(arguments)
    if options.learning_rate is None:
        options.learning_rate = RECIPES[options.recipe].learning_rate
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fashion_mnist.py",
        description="Trains a small convolutional network with batch norm on Fashion-MNIST.",
        epilog=EPILOG,
    )
    _add_training(parser.add_argument_group("training"))
    _add_machine(parser.add_argument_group("how it is computed"))
    _add_files(parser.add_argument_group("files"))
    parser.add_argument(
        "--evaluate",
        metavar="RUN",
        help="train nothing; score the weights of a run on the test images again: the name of a "
        "run in --output-dir, its folder, or a .safetensors file. Recipe, data, device, dtype and "
        "layout are those of the run unless they are given",
    )
    return parser


def _add_training(training: Any) -> None:
    rates = ", ".join(f"{name} {recipe.learning_rate:g}" for name, recipe in RECIPES.items())
    training.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default="tutorial",
        help="tutorial: start values and plain SGD as in the tutorial. modern: gammas of 1, He's "
        "initialisation, momentum, weight decay, a one-cycle schedule, normalized pixels "
        "(default: %(default)s)",
    )
    training.add_argument(
        "--steps",
        type=_count,
        default=1000,
        metavar="N",
        help="how many batches to train on (default: %(default)s)",
    )
    training.add_argument(
        "--batch-size",
        type=_count,
        default=256,
        metavar="N",
        help="images in a batch; epochs are reshuffled, and what does not fill a batch at the end "
        "of one is left out (default: %(default)s)",
    )
    training.add_argument(
        "--learning-rate",
        type=_rate,
        metavar="RATE",
        help=f"size of the steps, at its highest where it varies (default: {rates})",
    )
    training.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="determines start values and batches: same seed and machine, same result to the bit "
        "(default: %(default)s)",
    )
    training.add_argument(
        "--test-every",
        type=_count,
        default=100,
        metavar="N",
        help="score the test images every N steps for the curves, and in any case at the end "
        "(default: %(default)s)",
    )


def _add_machine(machine: Any) -> None:
    machine.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda or cuda:INDEX; cuda needs CuPy and a GPU (default: %(default)s)",
    )
    machine.add_argument(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, record the training step as one CUDA graph and replay it: the same "
        "numbers, without Python's time between kernels (default: %(default)s)",
    )
    machine.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="of parameters and images (default: %(default)s)",
    )
    machine.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="NHWC",
        help="order of the axes of images; the network is the same (default: %(default)s)",
    )


def _add_files(files: Any) -> None:
    files.add_argument(
        "--data",
        choices=["full", "sample"],
        default="full",
        help="full: 60,000 images, downloaded if they are nowhere on this machine. sample: the "
        "2,000 that ship with the package (default: %(default)s)",
    )
    files.add_argument(
        "--data-dir",
        metavar="DIR",
        help="where to look for the four files of Fashion-MNIST first, and to keep a download "
        "(default: the cache folder, then the system's)",
    )
    files.add_argument(
        "--output-dir",
        default="runs",
        metavar="DIR",
        help="where the folder of a run is made (default: %(default)s)",
    )
    files.add_argument(
        "--name",
        help="of the run's folder (default: RECIPE-seedN, with -sample where that was used)",
    )


def _count(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of {least} or more")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value
