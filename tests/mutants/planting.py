"""Faults that are planted in the library's own code, for as long as the kit looks at it."""

from contextlib import contextmanager


@contextmanager
def replaced(*replacements):
    """Replace attributes, given as (object, name, value), inside the `with` block."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@contextmanager
def with_item(mapping, key, value):
    """Give a mapping another value under a key that it has."""
    before = mapping[key]
    mapping[key] = value
    try:
        yield
    finally:
        mapping[key] = before
