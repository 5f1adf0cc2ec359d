"""A parent by what it is the best at (GEPA, algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfimprove import Candidate, Lineage, Run, hookimpl


class Pareto:
    """A candidate, drawn in proportion to the validation items that it is the best at."""

    needs_scores = True

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        grades = {i: e.per_item for r in lineage.rounds for i, e in r.scores if e.per_item}
        if not grades:
            return [lineage.root]
        items = sorted({q for own in grades.values() for q in own})
        wins = frontier(np.array([[own.get(q, 0.0) for q in items] for own in grades.values()]))
        return [lineage[str(run.rng("select", len(lineage)).choice(list(grades), p=wins / wins.sum()))]]


def frontier(grades: np.ndarray) -> np.ndarray:
    """How many items each candidate is the best at; 0 for one that another dominates.  (C, V) -> (C,)"""
    wins = (grades == grades.max(axis=0)).sum(axis=1)
    as_good = (grades[:, None] >= grades[None]).all(axis=2)  # (C, C): whether the first is as good as the second on every item
    return np.where((as_good & ~as_good.T).any(axis=0), 0, wins)
