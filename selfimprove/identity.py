"""Identities: digests of derivations, and random streams that are named instead of carried."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no blanks, floats by their shortest repr."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)


def digest(*values: Any) -> str:
    """32 hexadecimal digits (128 bits of SHA-256) that identify the values."""
    return hashlib.sha256(canonical(values).encode(errors="surrogatepass")).hexdigest()[:32]


def seed_for(seed: int, *name: str | int) -> int:
    """A 63-bit seed for the stream called `name` of a run with this seed.

    Streams with different names are independent, and a stream is the same after a resume because
    nothing is carried from one use to the next.
    """
    return int(digest("stream", seed, *name)[:16], 16) >> 1


def rng(seed: int, *name: str | int) -> np.random.Generator:
    """A fresh generator at the start of the stream called `name`."""
    return np.random.default_rng(seed_for(seed, *name))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON form; use numbers, text, lists and mappings")
