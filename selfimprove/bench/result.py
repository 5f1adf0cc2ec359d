"""The result of a benchmark, as one JSON value: what every arm reached and spent, how they compare, and what may be doubted."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from selfimprove import journal, records, runfolder, sealed
from selfimprove.bench.cells import DONE, FAILED, State
from selfimprove.bench.comparisons import comparisons
from selfimprove.bench.matrix import Arm, Matrix
from selfimprove.bench.opening import openings
from selfimprove.bench.suite import Suite
from selfimprove.bench.verdicts import WAITS
from selfimprove.errors import SelfImproveError, StorageError
from selfimprove.report.read import described, history, scored
from selfimprove.truth import truth_of

SCHEMA = 4
EDIT = 600
"""Characters of an edit that are shown."""
MEMBERS = 200
"""Candidates of a lineage that are drawn, the oldest."""
UNREADABLE = (SelfImproveError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""What a file of a run folder that is damaged makes of reading it."""


def result(suite: Suite, matrix: Matrix, states: Sequence[State], out: Path, test_failures: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the report says, from what is on disk."""
    known = {s.cell.key: s for s in states}
    opened = openings(out)
    if opened and all(s.state in (DONE, FAILED) for s in states):  # then a test that is missing should be there
        later = "it was not measured when the others were; the same command measures it once no cell fails"
        test_failures = {k: test_failures.get(k, later) for k in known}
    arms = [_arm(arm, [known[c.key] for c in arm.cells], suite, test_failures) for arm in matrix.arms]
    whose = {c["key"]: c for a in arms for c in a["cells"]}
    failures = [
        {"task": s.cell.task, "arm": s.cell.arm, "seed": s.cell.seed, "reason": c["reason"] if c["state"] == FAILED else WAITS}
        for s in states
        if (c := whose[s.cell.key])["state"] != DONE
    ]
    piece = {
        "seeds": list(suite.seeds),
        "openings": opened,
        **_made_with([s.folder for s in states if s.state == DONE]),
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
    }
    base = {t: dict(values) for t, values in matrix.base.items()}
    return assembled(suite, arms, [piece], {"failures": failures, "left_out": dict(matrix.left_out), "base": base})


def assembled(suite: Suite, arms: Sequence[Mapping[str, Any]], pieces: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
    """A result of these arms. Args: pieces: for each machine that ran some of the seeds, these, how its test was opened, and what it was."""
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "about": suite.about,
        "seeds": list(suite.seeds),
        "unit": suite.unit,
        "budgets": dict(suite.budgets),
        "effect": suite.effect,
        "tolerance": suite.tolerance,
        "arms": arms,
        "comparisons": comparisons(suite, arms),
        "written": dict(suite.written),
        "pieces": pieces,
        **more,
    }


def _made_with(folders: Sequence[Path]) -> dict[str, Any]:
    """The commit and versions that runs recorded; where they differ, all of them, with commas."""
    noted = [n for folder in folders if (n := _noted(folder))]
    commits = sorted({str(n.get("git") or "unknown") for n in noted})
    versions: dict[str, set[str]] = {}
    for name, version in (pair for n in noted for pair in n["packages"].items() if pair[1]):
        versions.setdefault(name, set()).add(str(version))
    return {
        "commit": None if commits in ([], ["unknown"]) else ", ".join(commits),
        "versions": {name: ", ".join(sorted(found)) for name, found in sorted(versions.items())},
    }


def _noted(folder: Path) -> dict[str, Any]:
    """What a run says that it was made with; nothing where that cannot be read, since a run that is opened has been checked against it."""
    try:
        found = json.loads((folder / runfolder.VERSIONS).read_text(encoding="utf-8"))
        return {"git": found["git"], "packages": dict(found["packages"])}
    except UNREADABLE:
        return {}


def _arm(arm: Arm, states: Sequence[State], suite: Suite, test_failures: Mapping[str, str]) -> dict[str, Any]:
    """One row: its cells, and what they reached on average."""
    cells = [_cell(s, arm.trained, test_failures.get(s.cell.key)) for s in states]
    row = {"name": arm.name, "task": arm.task, "kind": arm.kind, "of": list(arm.of), "trained": arm.trained, "differs": arm.differs}
    return averaged(row, cells, suite.unit)


def averaged(row: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    """A row with these cells, and what they reached and spent on average."""
    measured = [c for c in cells if c["score"] is not None]
    spent = [c["spent"].get(unit, 0.0) + (0.0 if row["trained"] else c["test_spent"].get(unit, 0.0)) for c in cells if c["state"] == DONE]
    metrics = sorted({m for c in measured for m in c["metrics"]})
    return {
        **row,
        "score": _mean([c["score"] for c in measured]),
        "standard_error": _standard_error([c["score"] for c in measured]),
        "metrics": {m: _mean([c["metrics"][m] for c in measured if m in c["metrics"]]) for m in metrics},
        "spent": _mean(spent),
        "transductive": any(c["transductive"] for c in cells),
        "cells": cells,
    }


def _cell(state: State, trained: bool, untested: str | None) -> dict[str, Any]:
    """What a cell did and reached; empty where it did not begin. One without a test score has failed, and says why.

    Args:
        untested: why it may have no test; None where nobody opened one.
    """
    found: dict[str, Any] = {
        "key": state.cell.key,
        "seed": state.cell.seed,
        "state": state.state,
        "reason": state.reason,
        "seconds": state.seconds,
        "score": None,
        "metrics": {},
        "per_item": {},
        "spent": {},
        "by_stage": {},
        "test_spent": {},
        "transductive": False,
        "curve": [],
        "rounds": [],
        "edits": [],
        "candidates": 0,
        "lineage": [],
    }
    if state.state != DONE:
        return found
    try:
        return found | _run(state.folder, trained) | _tested(state.folder, untested)
    except SelfImproveError as e:
        return found | {"state": FAILED, "reason": str(e)}
    except UNREADABLE as e:
        return found | {"state": FAILED, "reason": f"{state.folder} holds what no run writes ({type(e).__name__}: {e}); restore it from a copy"}


def _run(folder: Path, trained: bool) -> dict[str, Any]:
    """What a finished run did."""
    run = history(folder)
    found: dict[str, Any] = {"curve": [], "rounds": [], "edits": []}
    found |= {"spent": dict(run.ledger.get("totals", {})), "by_stage": dict(run.ledger.get("by_stage", {}))}
    totals = journal.spending(folder / runfolder.JOURNAL)
    best = -math.inf
    for number, (one, total) in enumerate(zip(run.lineage.rounds, totals[1:], strict=True), 1):
        best = max([best, *(e.score for _, e in one.scores if e.score is not None and e.finite)])
        found["curve"].append([total, best if math.isfinite(best) else None])
        found["rounds"].append({"round": number, "reward": _mean(scored(one.rewards)), **{f"truth_{n}": v for n, v in truth_of(one).items()}})
    if trained:
        ranked = sorted(((_mean(scored(e)), edit) for _, edit, e in run.edits() if scored(e)), key=lambda pair: pair[0] or 0.0)
        for name, (reward, edit) in (("best", ranked[-1]), ("worst", ranked[0])) if ranked else ():
            found["edits"].append({"which": name, "reward": reward, "text": described(edit)[:EDIT]})
    found["candidates"] = run.lineage.size
    found["lineage"] = [[c.id[:12], [p[:12] for p in c.parents], run.lineage.score(c.id)] for c in islice(run.lineage, MEMBERS)]
    return found


def _tested(folder: Path, untested: str | None) -> dict[str, Any]:
    """What a finished run reached on the sealed test, if that was opened; or that it failed. Args: untested: as for `_cell`."""
    test: Any = sealed.recorded(folder)
    if not (folder / runfolder.TEST).exists():
        return {} if untested is None else {"state": FAILED, "reason": f"its test: {untested}"}
    try:
        scores = {i: records.decode_evaluation(e) for i, e in test["scores"]}
        evaluation = scores[test["candidate"]]
        found = {
            "transductive": bool(test.get("transductive")),
            "test_spent": _numbers(test["spent"]),
            "chosen": str(test["chosen"]),
            "lineage_digest": str(test["lineage"]),
        }
        metrics, grades = _numbers(evaluation.metrics), _numbers(evaluation.per_item)
    except UNREADABLE as e:
        path = folder / runfolder.TEST
        raise StorageError(f"{path} holds no result ({type(e).__name__}: {e}); restore it from a copy: the sealed test is measured once") from e
    if evaluation.score is None:
        return found | {"state": FAILED, "reason": f"its test: {evaluation.error}"}
    split = _test_split(folder)
    return found | {"score": evaluation.score, "metrics": metrics, "per_item": {f"{split}/{i}": g for i, g in grades.items()}}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(k): float(v) for k, v in values.items()}


def _test_split(folder: Path) -> str:
    """What tells the test split of a cell from others: seeds whose tasks draw questions of their own may call them by the same names."""
    try:
        return str(json.loads((folder / "identity.json").read_text(encoding="utf-8"))["task"]["test"])[:8]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise StorageError(f"{folder / 'identity.json'} names no test split ({type(e).__name__}); restore it from a copy") from e


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over seeds."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
