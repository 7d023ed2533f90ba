"""Hypothesis profiles: registered under names of their own, never loaded from here."""

from __future__ import annotations

from hypothesis import Phase, settings


def register_profiles() -> None:
    """Register `tinygrad_bn_dev`, `tinygrad_bn_ci` and `tinygrad_bn_nightly`.

    Load one with `settings.load_profile(name)` or `--hypothesis-profile`.

    deadline=None throughout: the first example pays for imports and caches, and a shared machine is
    slow at times; neither is a fault.

    >>> register_profiles()
    >>> settings.get_profile("tinygrad_bn_ci").derandomize
    True
    """
    settings.register_profile("tinygrad_bn_dev", max_examples=20, deadline=None)
    # The same examples in every run: a change is then to blame for a new failure, not the dice.
    settings.register_profile(
        "tinygrad_bn_ci", max_examples=25, deadline=None, derandomize=True, print_blob=True
    )
    # `explain` reruns a failing test many times, which a long run cannot afford.
    settings.register_profile(
        "tinygrad_bn_nightly",
        max_examples=1000,
        deadline=None,
        print_blob=True,
        phases=[phase for phase in Phase if phase is not Phase.explain],
    )
