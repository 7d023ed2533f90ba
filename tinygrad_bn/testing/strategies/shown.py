"""Short texts for what the strategies draw.

Hypothesis prints failing examples, and warns about texts of tens of thousands of characters.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def shown(value: Any) -> str:
    """Return an array as code up to 32 entries; beyond that its dtype, shape and range.

    >>> shown(np.arange(3.0))
    'array([0., 1., 2.])'
    >>> shown(np.zeros((8, 4, 6, 6)))
    '<float64[8, 4, 6, 6] from 0 to 0>'
    """
    if not isinstance(value, np.ndarray):
        return repr(value)
    if value.size <= 32:
        return " ".join(repr(value).split())
    return f"<{value.dtype}{list(value.shape)} from {value.min():.6g} to {value.max():.6g}>"


def shown_fields(name: str, fields: dict[str, Any]) -> str:
    """Return `name(field=value, ...)`."""
    return f"{name}({', '.join(f'{key}={shown(value)}' for key, value in fields.items())})"
