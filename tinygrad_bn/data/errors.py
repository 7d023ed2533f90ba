"""The two ways in which obtaining data fails."""

from __future__ import annotations

from collections.abc import Sequence


class DatasetNotFoundError(FileNotFoundError):
    """Says that no place could give the data set: lists each place with its reason, and what to do.

    tried: (place, reason) pairs in the order in which they were tried.
    """

    def __init__(self, message: str, tried: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.tried = list(tried)


class DatasetCorruptError(ValueError):
    """Says that a file is not what its name promises: which file, what came, what was expected."""
