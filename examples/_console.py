"""What the examples show while they run: a progress bar, log lines, warnings, errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


class Progress:
    """A bar with the loss and the accuracy, where tqdm is installed and somebody watches.

    Log lines go to the standard output in any case, the bar to the standard error.
    """

    def __init__(self, steps: int):
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        # disable=None: no bar where the standard error is a file or a pipe.
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, loss: float, accuracy: float) -> None:
        """Move the bar on by one step."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.3f}", refresh=False)
            self._bar.update()


def warn(text: str) -> None:
    """Print `text` to the standard error."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def clean_errors() -> Iterator[None]:
    """End the program with the message of an error in the `with` block, without a traceback.

    For what a user can cause: a missing file, a device that is not there. An error elsewhere is a
    fault of the program and keeps its traceback.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"fashion_mnist.py: {error}") from None
