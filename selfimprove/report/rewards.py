"""How far each round's rewards can be trusted, as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from selfimprove.report.read import History
from selfimprove.statistics import reward_statistics

ROUNDS = 50
COLUMNS = {"reliability": "reliability", "best_of_k": "best of K gains", "best_of_k_corrected": "corrected", "ties_at_top": "ties at top"}
ONE_REPLICATE = "reliability unknown with one replicate, and the gain of the best of K not corrected for luck"


def rewards_table(run: History) -> Table | None:
    """A row per round that had groups of edits to choose from (of a long run, the last `ROUNDS`); None where none had."""
    measured = [(n, reward_statistics(one.trials, one.rewards)) for n, one in list(enumerate(run.lineage.rounds, 1))[-ROUNDS:]]
    rows = [(n, found) for n, found in measured if found]
    if not rows:
        return None
    table = Table(title="How far the rewards can be trusted", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("round", *COLUMNS.values()):
        table.add_column(heading, justify="right")
    for number, found in rows:
        cells = [f"{found[c]:.3f}" if c in found else "unknown" for c in COLUMNS]
        table.add_row(str(number), *cells)
    if any("best_of_k_corrected" not in found for _, found in rows):
        table.caption, table.caption_justify = ONE_REPLICATE, "left"
    return table
