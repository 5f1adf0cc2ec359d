"""Where the final answer stands in a text that a model wrote. Every step is linear in the text, whatever the text is."""

from __future__ import annotations

import re

LONGEST = 400
"""Characters. A longer "answer" is none."""
TAIL = 8_000
"""Characters at the end of a text in which an answer is looked for."""

_BLANK = " \t\r\n\u00a0"
_ANCHOR = re.compile(r"(?:\banswer[ \t]{0,3}(?:\*\*|__)?[ \t]{0,3}(?:is\b|[:=])|####)(?:\*\*|__)?[ \t:]{0,3}([^\n]+)", re.IGNORECASE)
_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_WRAPPED = re.compile(r"^(?:\$\$?(?P<a>.*?)\$?\$|\\\((?P<b>.*)\\\)|\\\[(?P<c>.*)\\\])$", re.DOTALL)


def boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{…}`` (or ``\\fbox``) whose braces are closed; None without one."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s{0,3}\{", text)][-8:]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i]
    return None


def stated(text: str) -> str | None:
    """The answer that a text marks as its answer, in this order: boxed, in ``<answer>`` tags, or after the last "answer:", "answer is" or "####".

    None where it marks none, or where what it marks is empty or too long to be one.
    """
    text = text[-TAIL:]
    found = boxed(text)
    if found is None and (tags := _TAG.findall(text)):
        found = tags[-1]
    if found is None and (lines := _ANCHOR.findall(text)):
        found = lines[-1]
    return cleaned(found) if found is not None else None


def final_line(text: str) -> str | None:
    """The stated answer, or else the last line that is not empty; None for a text without any."""
    found = stated(text)
    if found is None:
        lines = text[-TAIL:].split("\n")
        found = next((c for line in reversed(lines) if (c := cleaned(line))), None)
    return found


def cleaned(text: str) -> str | None:
    """A bare answer: without the marks around it (blanks, dollars, emphasis, a full stop); None where nothing or too much is left."""
    if len(text) > 2 * LONGEST:
        return None
    text = text.lstrip(_BLANK + "*_").rstrip(_BLANK + "*_.,;:")
    if wrapped := _WRAPPED.match(text):
        text = next(g for g in wrapped.groups() if g is not None).strip()
    return text if 0 < len(text) <= LONGEST else None
