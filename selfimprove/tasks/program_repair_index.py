"""Chooses the bug of every function, and writes the index that `program_repair` reads: `python -m selfimprove.tasks.program_repair_index`.

A function is kept where its hidden test has at least three cases and some bug, of kinds in random order, fails it. Bugs run in the sandbox.
"""

from __future__ import annotations

import json
from collections import Counter

from selfimprove.identity import rng
from selfimprove.sandbox import Sandbox
from selfimprove.sandbox.calls import called
from selfimprove.storage import write_bytes
from selfimprove.tasks.bugs import KINDS, count, with_bug
from selfimprove.tasks.program_repair import INDEX, Case, Function, all_cases

LEAST = 3
TRIES = 12


def fails(sandbox: Sandbox, source: str, function: Function, cases: list[Case]) -> bool:
    """Whether a source fails at least one case."""
    found = called(sandbox, source, function.entry, [c.arguments for c in cases])
    return any(r.error is not None or not c.right(r.value) for c, r in zip(cases, found, strict=True))


def chosen(sandbox: Sandbox, function: Function, cases: list[Case], used: Counter[str]) -> tuple[str, int] | None:
    """The bug of a function: of the kind that was used least so far, and there one at random."""
    if len(cases) < LEAST or fails(sandbox, function.source, function, cases):
        return None
    chance = rng(0, "program_repair", function.id)
    places = [(k, int(n)) for k in sorted(KINDS, key=lambda k: (used[k], k)) for n in chance.permutation(count(function.source, k))]
    for kind, number in places[:TRIES]:
        if fails(sandbox, with_bug(function.source, kind, number), function, cases):
            return kind, number
    return None


def main() -> None:
    sandbox, used = Sandbox("auto"), Counter[str]()
    bugs: dict[str, list[object]] = {}
    for function, cases in all_cases():
        if (bug := chosen(sandbox, function, cases, used)) is not None:
            used[bug[0]] += 1
            bugs[function.id] = list(bug)
    write_bytes(INDEX, (json.dumps({"kinds": dict(sorted(used.items())), "bugs": bugs}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
