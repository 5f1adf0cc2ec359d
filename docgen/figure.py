"""The figure of the six verbs, drawn from the hooks and the records: ``python -m docgen.figure > docs/six_verbs.svg``.

What a verb takes, gives and does without an answer is read from its hook; the letters from the box; the fields of a record from its class.
Colours are the page's where the drawing is part of one (CSS variables of the theme), and light ones where it is an image.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from selfimprove import hooks, records

LOOP = ("select", "propose", "apply", "reward", "update", "evaluate")
WIDTH, BOX, STEP, TOP = 460, 58, 104, 16
LEFT, RIGHT = 12, 388
"""Where the boxes begin and end; the lineage stands right of them."""
STYLE = """
.six .paper{fill:var(--md-default-bg-color,#fff)}
.six .box{fill:var(--md-code-bg-color,#f5f5f5);stroke:var(--md-default-fg-color--lighter,#bbb)}
.six .bar{fill:var(--md-primary-fg-color,#3f51b5)}
.six .line{stroke:var(--md-default-fg-color--light,#555);stroke-width:1.5;fill:none}
.six .head{fill:var(--md-default-fg-color--light,#555)}
.six text{fill:var(--md-default-fg-color,#111);font:14px system-ui,sans-serif}
.six .verb{font-weight:700;font-size:17px}
.six .code{font:13px ui-monospace,monospace}
.six .soft{fill:var(--md-default-fg-color--light,#555);font-size:13px}
.six .onbar{fill:var(--md-primary-bg-color,#fff);font-weight:700}
"""


@dataclass(frozen=True)
class Verb:
    """One step of the loop, as its hook specifies it."""

    name: str
    role: str
    letter: str
    takes: tuple[str, ...]
    gives: str
    """What it gives a sequence of."""
    fields: tuple[str, ...]


def verbs() -> list[Verb]:
    """The six, in the order of the loop."""
    owners = {name: role for role, spec in hooks.ROLES.items() for name in vars(spec) if name in LOOP}
    letters = {verb: letter for letter, verb in re.findall(r"^\s*([A-Z]) = (\w+)\(", hooks.__doc__ or "", flags=re.MULTILINE)}
    return [_verb(getattr(hooks.ROLES[owners[name]], name), owners[name], letters[name]) for name in LOOP]


def _verb(function: Callable[..., Any], role: str, letter: str) -> Verb:
    signature = inspect.signature(function)
    scores = "Scores" in str(signature.return_annotation)
    found = re.findall(r"\b(Candidate|Edit|Trial|Evaluation)\b", str(hooks.Scores if scores else signature.return_annotation))
    record = getattr(records, found[-1])
    takes = tuple(p for p in signature.parameters if p not in ("self", "lineage", "run"))
    gives = f"(id, {record.__name__}) pairs" if scores else f"{record.__name__} records"
    return Verb(function.__name__, role, letter, takes, gives, tuple(f.name for f in dataclasses.fields(record)))


def document() -> str:
    """The figure, as SVG."""
    found = verbs()
    height = TOP + STEP * len(found) + BOX + 8
    body = "\n".join([_bar(height), *(line for i, v in enumerate(found) for line in _drawn(v, TOP + STEP * i)), *_end(TOP + STEP * len(found))])
    says = "; ".join(f"{v.name}, by the {v.role}, gives {v.gives}" for v in found)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="six" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="six-title six-desc">\n'
        f'<title id="six-title">One round: six verbs over a lineage</title>\n<desc id="six-desc">{escape(says)}</desc>\n'
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="six-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">'
        '<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _drawn(verb: Verb, y: int) -> Iterator[str]:
    """A verb's box, what it reads of the lineage, and the arrow of what it gives."""
    yield f'<rect class="box" x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{BOX}" rx="6"/>'
    yield _text(LEFT + 14, y + 25, f"{verb.letter} = {verb.name}", "verb")
    yield _text(RIGHT - 14, y + 25, verb.role, "soft", anchor="end")
    yield _text(LEFT + 14, y + 46, f"({', '.join((*verb.takes, 'lineage'))})", "code")
    yield _arrow(f"M{RIGHT + 22} {y + BOX // 2}H{RIGHT + 4}")
    yield _arrow(f"M{LEFT + 28} {y + BOX}V{y + STEP - 4}")
    yield _text(LEFT + 44, y + BOX + 20, verb.gives, "code")
    first, second = _two_lines(verb.fields)
    yield _text(LEFT + 44, y + BOX + 36, first + (", …" if second else ""), "soft")


def _end(y: int) -> Iterator[str]:
    """The round joins the lineage."""
    fields = ", ".join(f.name for f in dataclasses.fields(records.Round))
    yield f'<rect class="box" x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{BOX}" rx="6"/>'
    yield _text(LEFT + 14, y + 25, "L = L + Round", "verb")
    yield _text(LEFT + 14, y + 46, f"({fields})", "code")
    yield _arrow(f"M{RIGHT} {y + BOX // 2}H{RIGHT + 18}")


def _bar(height: int) -> str:
    x, middle = RIGHT + 22, height // 2
    return (
        f'<rect class="bar" x="{x}" y="{TOP}" width="38" height="{height - TOP - 8}" rx="6"/>\n'
        f'<text class="onbar" transform="translate({x + 14} {middle}) rotate(90)" text-anchor="middle">L, the lineage: every round until now</text>'
    )


def _two_lines(fields: tuple[str, ...], width: int = 44) -> tuple[str, str]:
    """The fields that fit one line, and the others."""
    shown = len(fields)
    while len(", ".join(fields[:shown])) > width:
        shown -= 1
    return ", ".join(fields[:shown]), ", ".join(fields[shown:])


def _text(x: int, y: int, content: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def _arrow(path: str) -> str:
    return f'<path class="line" d="{path}" marker-end="url(#six-head)"/>'


if __name__ == "__main__":
    sys.stdout.write(document())
