"""Calls of a function that nobody has read: literals go in, literals come out, and no assertion crosses."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selfimprove.sandbox import calls_main
from selfimprove.sandbox.records import Limits, Outcome, Program

LIMITS = Limits(cpu_seconds=3, wall_seconds=10, memory_mib=256, processes=4, disk_mib=1, output_kib=16)
SECONDS = 0.25
"""Processor time of one call."""
_CHARACTERS = 20_000
_MAIN = Path(calls_main.__file__).read_text(encoding="utf-8")


class Runs(Protocol):
    """What runs programs: `Sandbox` or `run.sandbox`."""

    def run(self, program: Program, *, limits: Limits | None = None) -> Outcome: ...


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call came to."""

    value: Any = None
    error: str | None = None
    """Why there is no value; None where there is one."""
    lost: bool = False
    """The whole program ended before it could tell; says nothing about this call."""


def called(sandbox: Runs, source: str, entry: str, arguments: Sequence[str]) -> list[Returned]:
    """What each call returns, in order; `arguments` are literal tuples as text. A function that does not work is data."""
    if not arguments:
        return []
    job = {"source": source, "entry": entry, "arguments": list(arguments), "seconds": SECONDS, "characters": _CHARACTERS}
    outcome = sandbox.run(Program({"main.py": _MAIN}, "main.py", job), limits=LIMITS)
    rows = outcome.answer
    if not isinstance(rows, list) or len(rows) != len(arguments):
        return [Returned(error=outcome.reason, lost=True)] * len(arguments)
    return [_read(row) for row in rows]


def _read(row: Any) -> Returned:
    """A row that the inside wrote, or that a hostile function wrote in its place."""
    match row:
        case ["returned", str(text)] if len(text) <= _CHARACTERS:
            try:
                return Returned(ast.literal_eval(text))
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                return Returned(error="it returned no literal")
        case ["raised", str(name)]:
            return Returned(error=name[:100])
    return Returned(error="it said something else")
