"""The live table of a benchmark: one row per arm and task, one mark per seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from selfimprove.bench.cells import DONE, FAILED, RUNNING, WAITING, State, progress
from selfimprove.bench.matrix import Arm, Matrix
from selfimprove.bench.suite import Suite
from selfimprove.report.safe import safe
from selfimprove.runfolder import JOURNAL

MARKS = {DONE: ("✓", "green"), FAILED: ("✗", "red"), RUNNING: ("▸", "yellow")}


class Board:
    """What a benchmark shows while it runs: a live table in a terminal, one line per cell that ends elsewhere."""

    def __init__(self, suite: Suite, matrix: Matrix, console: Console) -> None:
        self.suite, self.matrix, self.console = suite, matrix, console
        self._told: set[tuple[str, str]] = set()  # cell and state
        self._live: Live | None = None
        self._read: dict[str, tuple[int, tuple[int, dict[str, float], float | None]]] = {}  # by cell: bytes of its journal, and what they say

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While inside, `tell` draws."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4) as self._live:
            yield

    def tell(self, states: Sequence[State]) -> None:
        if self._live is not None:
            self._live.update(self.table(states))
            return
        for one in states:
            waits = one.state == WAITING and one.reason
            if (one.state in (DONE, FAILED) or waits) and (one.cell.key, one.state) not in self._told:
                self._told.add((one.cell.key, one.state))
                done = sum(s.state == DONE for s in states)
                words = f"[{done}/{len(states)}] {one.cell.task}/{one.cell.arm} seed {one.cell.seed}: {one.state}"
                self.console.print(safe(words + (f" ({one.reason})" if one.reason else "")), highlight=False, soft_wrap=True)

    def table(self, states: Sequence[State]) -> Table:
        """All cells, by arm."""
        known = {s.cell.key: s for s in states}
        unit = self.suite.unit
        table = Table(title=f"{self.suite.name}: {sum(s.state == DONE for s in states)} of {len(states)} cells are done", title_justify="left")
        for heading in ("task", "arm", "seeds", unit, "rounds", "best validation"):
            table.add_column(heading, justify="left" if heading in ("task", "arm", "seeds") else "right")
        for arm in self.matrix.arms:
            table.add_row(*self._row(arm, [known[c.key] for c in arm.cells], unit))
        return table

    def _progress(self, state: State) -> tuple[int, dict[str, float], float | None]:
        """What the cell's journal says, read again only where it has grown."""
        path = state.folder / JOURNAL
        size = path.stat().st_size if path.exists() else 0
        if self._read.get(state.cell.key, (-1,))[0] != size:
            self._read[state.cell.key] = (size, progress(state))
        return self._read[state.cell.key][1]

    def _row(self, arm: Arm, states: Sequence[State], unit: str) -> list[Text | str]:
        marks = Text()
        for one in states:
            marks.append(*MARKS.get(one.state, ("·", "dim")))
        started = [self._progress(s) for s in states if s.state in (RUNNING, DONE)]
        rounds = [r for r, _, _ in started]
        spent = [t.get(unit, 0.0) for _, t, _ in started]
        scores = [s for _, _, s in started if s is not None]
        mean = sum(scores) / len(scores) if scores else None
        return [
            Text(arm.task),
            Text(arm.name),
            marks,
            f"{sum(spent) / len(spent):.3g} of {self.suite.budgets[arm.task]:.3g}" if spent else "",
            f"{sum(rounds) / len(rounds):.1f}" if rounds else "",
            "" if mean is None else f"{mean:.3f}",
        ]
