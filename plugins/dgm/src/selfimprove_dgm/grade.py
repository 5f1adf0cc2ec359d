"""Measuring an agent: it runs in the sandbox, its repairs run in another, and both are judged here, from literals."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfimprove.code import Tree
from selfimprove.identity import digest
from selfimprove.records import Evaluation
from selfimprove.run import Run
from selfimprove.sandbox import Limits, Program, calls, calls_main
from selfimprove.sandbox.calls import called
from selfimprove.task import Item
from selfimprove.tasks import bugs, program_repair
from selfimprove.tasks.program_repair import Case, decode, equal
from selfimprove_dgm.genome import ENTRY

CHUNK = 10
"""Functions that an agent is given in one program."""
LIMITS = Limits(cpu_seconds=5, wall_seconds=20, memory_mib=256, processes=4, disk_mib=4, output_kib=64)
"""Of one chunk."""
SECONDS = 30.0
"""Processor time of one measurement: the agent's own and that of its repairs. What is left then counts as not repaired."""
VOID = "void"
"""The metric of a measurement that was tampered with, and has no score."""
_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Repair:
    """What an agent made of one function."""

    source: str | None
    claimed: tuple[tuple[str, str], ...] = ()
    """Examples (arguments, result) of which it says that its source passes them."""


def measured(tree: Tree, items: Sequence[Item], run: Run) -> Evaluation:
    """The share of the functions that an agent repairs, by item; no score where it does not run, cheats or the evaluator was changed.

    Reads the hidden tests of the items as labels.
    """
    before, clock = evaluator_digest(), _Clock(run)
    hidden = {i: decode(answers[0]) for i, answers in run.task.labels(q for item in items for q in item.questions).items()}
    repairs: dict[str, Repair] = {}
    problems: list[str] = []
    for at in range(0, len(items), CHUNK):
        if not clock.allows(LIMITS):
            problems.append(f"it went over its {SECONDS:g} processor seconds")
            break
        chunk = items[at : at + CHUNK]
        job = {"mode": "repair", "tasks": [{"id": i.id, "entry": i.title, "source": i.context} for i in chunk]}
        outcome = run.sandbox.run(Program(tree, ENTRY, job), limits=LIMITS)
        found = read_repairs(outcome.answer, chunk)
        if not found:
            problems.append(outcome.reason)
        repairs |= found
    if not repairs:
        return Evaluation.failed(f"the agent does not run: {problems[0]}")
    per_item: dict[str, float] = {}
    for item in items:
        repair = repairs.get(item.id, Repair(None))
        value = graded(item, repair, hidden[item.id], run) if clock.allows(calls.LIMITS) else 0.0
        if value is None:
            return _void(f"the agent says that {item.title} passes examples that it does not pass: its measurement is void")
        per_item[item.id] = value
    if evaluator_digest() != before:
        return _void("the evaluator's files changed while it measured: the measurement is void")
    return Evaluation(sum(per_item.values()) / len(per_item), {"tasks": float(len(per_item))}, per_item)


class _Clock:
    """What one measurement has used of its processor time; programs that are remembered cost what they cost when they ran."""

    def __init__(self, run: Run) -> None:
        self._ledger, self._began = run.ledger, run.ledger.totals["cpu_seconds"]

    def allows(self, limits: Limits) -> bool:
        """Whether a program may begin, so that even one that uses all of its limits ends in time."""
        return self._ledger.totals["cpu_seconds"] - self._began + limits.cpu_seconds <= SECONDS


def _void(why: str) -> Evaluation:
    return Evaluation(None, {VOID: 1.0}, error=why)


def graded(item: Item, repair: Repair, hidden: Sequence[Case], run: Run) -> float | None:
    """1 where a repair passes the whole hidden test, 0 elsewhere; None where the agent's claim about it is false.

    What an agent logs is never read as a result: a claim can only void a measurement.
    """
    if repair.source is None:
        return 0.0
    claims = [Case(*pair) for pair in repair.claimed]
    cases = [*claims, *hidden]  # claims first, as the agent tried them
    returned = called(run.sandbox, repair.source, item.title, [c.arguments for c in cases])
    right = [r.error is None and _right(c, r.value) for c, r in zip(cases, returned, strict=True)]
    if any(not ok and not r.lost for ok, r in zip(right[: len(claims)], returned, strict=False)):
        return None
    return float(bool(hidden) and all(right[len(claims) :]))


def read_repairs(answer: Any, items: Sequence[Item]) -> dict[str, Repair]:
    """What an agent answered, by item; whatever has another form is no repair."""
    found: dict[str, Repair] = {}
    for item in items:
        match answer.get(item.id) if isinstance(answer, dict) else None:
            case {"source": str(source), **rest} if len(source) <= _CHARACTERS:
                found[item.id] = Repair(source, _claims(rest.get("log")))
            case None:
                pass
            case _:
                found[item.id] = Repair(None)
    return found


def evaluator_digest() -> str:
    """The digest of every file that decides a score, as it is on disk now."""
    modules = (calls, calls_main, bugs, program_repair)
    paths = [Path(__file__), program_repair.INDEX, *(Path(str(m.__file__)) for m in modules)]
    return digest([hashlib.sha256(p.read_bytes()).hexdigest() for p in paths])


def _claims(log: Any) -> tuple[tuple[str, str], ...]:
    passed = log.get("passed") if isinstance(log, dict) else None
    if not isinstance(passed, list):
        return ()
    return tuple((str(p[0]), str(p[1])) if isinstance(p, list) and len(p) == 2 else ("(", "") for p in passed[:50])


def _right(case: Case, value: Any) -> bool:
    try:
        return equal(ast.literal_eval(case.result), value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # a claim that is no literal
        return False
