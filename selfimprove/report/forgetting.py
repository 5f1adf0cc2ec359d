"""What the policies of a run forgot, as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from selfimprove.forgetting import PREFIX
from selfimprove.report.read import History
from selfimprove.report.safe import safe

ROUNDS = 50
COLUMNS = {"loss": "nats per token", "lost": "lost", "accuracy": "accuracy"}


def forgetting_table(run: History) -> Table | None:
    """A row for the root and for every child that was measured (of a long run, those of the last `ROUNDS`); None where none was."""
    numbered = list(enumerate(run.lineage.rounds, 1))
    rejected = {i for _, one in numbered for i, e in one.scores if (e.error or "").startswith("rejected")}
    measured = [(n, i, e.metrics) for n, one in numbered for i, e in one.scores if f"{PREFIX}loss" in e.metrics]
    rows = [r for r in measured if r[1] == run.lineage.root.id or r[0] > len(numbered) - ROUNDS]
    if not rows:
        return None
    table = Table(title="What is forgotten, on unrelated items", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("round", justify="right")
    table.add_column("candidate")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    table.add_column("")
    for number, candidate, metrics in rows:
        cells = [f"{metrics[name]:.4g}" if (name := f"{PREFIX}{c}") in metrics else "–" for c in COLUMNS]
        root = candidate == run.lineage.root.id
        table.add_row("root" if root else str(number), safe(candidate[:8]), *cells, "rejected" if candidate in rejected else "")
    return table
