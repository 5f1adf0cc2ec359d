"""Text that a model wrote, made harmless for a terminal."""

from __future__ import annotations

import unicodedata

from rich.text import Text

_HARMFUL = {"Cc", "Cf", "Cs", "Co", "Cn"}
"""Unicode categories that can move the cursor, change colours, turn the reading direction or fail to encode."""


def safe(text: str, limit: int | None = None) -> Text:
    """The text without control characters and, as a `rich.text.Text`, without markup; cut at `limit` characters."""
    cut = text if limit is None or len(text) <= limit else text[:limit].rstrip() + " …"
    return Text("".join(_visible(c) for c in cut.expandtabs(4)))


def _visible(character: str) -> str:
    if character == "\n" or unicodedata.category(character) not in _HARMFUL:
        return character
    return "\N{REPLACEMENT CHARACTER}"
