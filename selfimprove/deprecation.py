"""What still works and will not for ever: one warning for each, naming what to use instead."""

from __future__ import annotations

import warnings

_WARNED: set[str] = set()


class PluginDeprecationWarning(FutureWarning):
    """Shown to users too, as they are the ones who can upgrade a plugin."""


def deprecated(what: str, instead: str) -> None:
    """Warn that something is going to be taken away: once in a process, whoever uses it and however often."""
    if what not in _WARNED:
        _WARNED.add(what)
        warnings.warn(f"{what} is deprecated and will be taken away with the next version of the hooks; use {instead}", PluginDeprecationWarning, 2)
