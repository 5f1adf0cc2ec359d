"""The archive: a view of the lineage in columns, so that a choice among 100,000 agents is a few operations on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfimprove.records import Candidate, Lineage, Round
from selfimprove_dgm.grade import VOID


class Archive:
    """Columns over the candidates of a lineage, oldest first, kept as rounds arrive.

    * ``score``: the mean over all evaluations, weighted by their items, NaN without any. (N,)
    * ``children``: how many candidates name this one as their first parent. (N,)
    * ``won``, ``lost``: tasks solved and failed by the candidate itself. (N,)
    * ``void``: measurements that were tampered with. (N,)
    * ``clade_won``, ``clade_lost``: the same, summed over the candidate and all its descendants. (N,)
    """

    NAMES: tuple[str, ...] = ("weight", "total", "children", "won", "lost", "void", "clade_won", "clade_lost")
    """Of the columns that are kept."""

    def __init__(self) -> None:
        self._start(None)

    def follow(self, lineage: Lineage) -> Archive:
        """This archive, brought to a view of a lineage; begun anew where the view is no continuation of the last one."""
        seen = self._rounds
        same = self._root == lineage.root and seen <= len(lineage) and (seen == 0 or lineage.round(seen - 1) is self._last)
        if not same:
            self._start(lineage.root)
        for i in range(self._rounds, len(lineage)):
            self._add(lineage.round(i))
        return self

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> NDArray[Any]:
        """(N,)"""
        column: NDArray[Any] = self._columns[name][: len(self.ids)]
        return column

    @property
    def score(self) -> NDArray[Any]:
        """(N,)"""
        weight = self.column("weight")
        score: NDArray[Any] = np.divide(self.column("total"), weight, out=np.full(len(weight), np.nan), where=weight > 0)
        return score

    def _start(self, root: Candidate | None) -> None:
        self._root, self._rounds = root, 0
        self._last: Round | None = None
        self.ids: list[str] = []
        self.place: dict[str, int] = {}
        self.parent: list[int] = []
        self._columns = {n: np.zeros(1024) for n in self.NAMES}
        if root is not None:
            self._born(root, -1)

    def _born(self, candidate: Candidate, parent: int) -> None:
        self.place[candidate.id] = len(self.ids)
        self.ids.append(candidate.id)
        self.parent.append(parent)
        if len(self.ids) > len(self._columns["weight"]):
            self._columns = {n: np.concatenate([c, np.zeros(len(c))]) for n, c in self._columns.items()}
        if parent >= 0:
            self._columns["children"][parent] += 1

    def _add(self, new: Round) -> None:
        for child in new.children:
            self._born(child, self.place[child.parents[0]])
        for name, evaluation in new.scores:
            at, items = self.place[name], max(1, len(evaluation.per_item))
            if evaluation.score is None:
                self._columns["void"][at] += VOID in evaluation.metrics
                continue
            self._columns["weight"][at] += items
            self._columns["total"][at] += items * evaluation.score
            won = sum(evaluation.per_item.values())
            self._columns["won"][at] += won
            self._columns["lost"][at] += len(evaluation.per_item) - won
            while at >= 0:
                self._columns["clade_won"][at] += won
                self._columns["clade_lost"][at] += len(evaluation.per_item) - won
                at = self.parent[at]
        self._rounds += 1
        self._last = new
