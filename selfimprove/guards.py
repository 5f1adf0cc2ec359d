"""Guards: observers that say when to stop, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.ledger import UNITS
from selfimprove.records import Lineage
from selfimprove.run import Run


@dataclass
class Rounds:
    """Stop after this many rounds."""

    rounds: int = 2

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        return f"all {self.rounds} rounds are done" if len(lineage) >= self.rounds else None


class Budget:
    """Stop before the round after the budget is spent, in any units of the ledger: ``Budget(flops=1e15, labels=500)``."""

    def __init__(self, **limits: float | None) -> None:
        self.limits = {unit: limit for unit, limit in limits.items() if limit is not None}
        unknown = sorted(set(self.limits) - set(UNITS))
        if unknown or not self.limits:
            raise ConfigError(f"a budget wants limits in {', '.join(UNITS)}; got {', '.join(unknown) or 'none'}")

    @hookimpl
    def should_stop(self, run: Run) -> str | None:
        for unit, limit in self.limits.items():
            if run.ledger.totals[unit] >= limit:
                return f"the budget of {limit:g} {unit} is spent ({run.ledger.totals[unit]:g})"
        return None


@dataclass
class Plateau:
    """Stop when the best score has not risen by `margin` for `patience` rounds."""

    patience: int = 3
    margin: float = 0.0

    needs_scores = True
    _seen: list[tuple[float, float]] = field(default_factory=list, init=False, repr=False)
    """For each round that was looked at, its best score and the best until then; -inf without any."""

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        del self._seen[len(lineage) :]
        for i in range(len(self._seen), len(lineage)):
            top = max((e.score for _, e in lineage.round(i).scores if e.score is not None), default=-math.inf)
            self._seen.append((top, max(top, self._seen[-1][1]) if self._seen else top))
        if len(lineage) <= self.patience:
            return None
        early, late = self._seen[-1 - self.patience][1], max((top for top, _ in self._seen[-self.patience :]), default=-math.inf)
        if -math.inf < late <= early + self.margin:
            return f"no score rose by more than {self.margin:g} in {self.patience} rounds"
        return None


class NonFinite:
    """Stop after a round that measured a value that is not a finite number."""

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        if not len(lineage):
            return None
        last = lineage.round(-1)
        measured = [e.score for e in (*last.rewards, *(e for _, e in last.scores)) if e.score is not None]
        if any(not math.isfinite(s) for s in measured):
            return f"round {len(lineage)} measured a value that is not finite; lower the learning rate, or look at its trials with `show`"
        return None
