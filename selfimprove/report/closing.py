"""The closing table: what a run reached, next to the arms it has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from selfimprove.records import Evaluation
from selfimprove.report.read import TRANSDUCTIVE, History, history, identity, judged
from selfimprove.report.safe import safe

ARM = "arm/"


@dataclass(frozen=True)
class Row:
    """One measured system."""

    name: str
    accuracy: float
    standard_error: float | None
    """None where it cannot be told (a single item)."""
    items: int


def closing_table(folder: Path) -> Table:
    """The arms of the root, then the candidate after each round: accuracy, standard error, number of questions.

    Raises: ResumeError, where the folder holds no run.
    """
    run = history(folder)
    arms = _arms(_root_evaluation(run))
    table = Table(
        title="Closed-book accuracy on questions never trained on" if arms else "Scores, as the evaluator measured them", title_justify="left"
    )
    for heading, justify in (("", "left"), ("accuracy", "right"), ("standard error", "right"), ("questions", "right")):
        table.add_column(heading, justify="right" if justify == "right" else "left")
    rows = closing_rows(run)
    last_arm = sum(r.name in arms for r in rows)
    for i, row in enumerate(rows, 1):
        error = "" if row.standard_error is None else f"{row.standard_error:.3f}"
        table.add_row(safe(row.name), f"{row.accuracy:.3f}", error, str(row.items), end_section=i == last_arm)
    said = [s for s in (_kept(run), judged(folder)) if s] if rows else ["no candidate was evaluated; choose one with `evaluator=NAME`"]
    if identity(folder).get("transductive"):
        said.append(TRANSDUCTIVE)
    table.caption = "\n".join(said) or None
    return table


def _kept(run: History) -> str | None:
    """Which candidate the run leaves one with; None while nothing has a score."""
    if (best := run.lineage.best()) is None:
        return None
    made = "the untouched root" if best.id == run.lineage.root.id else f"that of round {run.lineage.round_of(best.id) + 1}"
    return f"the best candidate is {made}; `selfimprove eval` and `export RUN best` take it"


def closing_rows(run: History) -> list[Row]:
    """The rows of the closing table. A metric ``arm/<name>`` of the root's evaluation is an arm; beside it stand
    ``arm/<name>/se`` and ``arm/<name>/n``."""
    found = run.evaluations()
    rows = list(_arms(_root_evaluation(run)).values())
    if not rows and run.lineage.root.id in found:
        rows += _row("root", found[run.lineage.root.id])
    for number, one in enumerate(run.lineage.rounds, 1):
        evaluated = [found[c.id] for c in one.children if c.id in found]
        if evaluated:
            rows += _row(f"after round {number}", evaluated[-1])
    return rows


def _root_evaluation(run: History) -> Evaluation | None:
    return run.evaluations().get(run.lineage.root.id)


def _arms(evaluation: Evaluation | None) -> dict[str, Row]:
    metrics: Mapping[str, float] = {} if evaluation is None else evaluation.metrics
    names = [m.removeprefix(ARM) for m in metrics if m.startswith(ARM) and not m.endswith(("/se", "/n"))]
    return {n: Row(n, metrics[ARM + n], metrics.get(f"{ARM}{n}/se"), int(metrics.get(f"{ARM}{n}/n", 0))) for n in names}


def _row(name: str, evaluation: Evaluation) -> list[Row]:
    """The row of a candidate; none where it could not be measured."""
    score = evaluation.score
    if score is None:
        return []
    for arm in _arms(evaluation).values():  # the arm that the score is, knows its clusters
        if arm.accuracy == score:
            return [Row(name, score, arm.standard_error, arm.items)]
    return [Row(name, score, _standard_error(evaluation), len(evaluation.per_item))]


def _standard_error(evaluation: Evaluation) -> float | None:
    """Of the mean over items, taken as independent."""
    values = list(evaluation.per_item.values())
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
