"""Selectors: pure functions of the lineage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage


class Latest:
    """The youngest candidate: a chain of rounds, each from the last one's child."""

    @hookimpl
    def select(self, lineage: Lineage) -> Sequence[Candidate]:
        return [lineage.latest]


class Best:
    """The candidate with the best score, the oldest of equals; the root while nothing has a score."""

    needs_scores = True

    @hookimpl
    def select(self, lineage: Lineage) -> Sequence[Candidate]:
        return [lineage.best() or lineage.root]


@dataclass
class Gate:
    """The youngest candidate that did not lose more than `tolerance` against the best of its ancestors.

    A child that lost more is passed over, and the round starts again from the last good candidate. A candidate
    without a score passes.
    """

    tolerance: float = 0.0

    needs_scores = True

    @hookimpl
    def select(self, lineage: Lineage) -> Sequence[Candidate]:
        for candidate in reversed(lineage):
            if self.passes(candidate, lineage):
                return [candidate]
        return [lineage.root]

    def passes(self, candidate: Candidate, lineage: Lineage) -> bool:
        score = lineage.score(candidate.id)
        if score is None:
            return True
        before = [s for c in _ancestors(candidate, lineage) if (s := lineage.score(c.id)) is not None]
        return not before or score >= max(before) - self.tolerance


def _ancestors(candidate: Candidate, lineage: Lineage) -> list[Candidate]:
    found: dict[str, Candidate] = {}
    todo = list(candidate.parents)
    while todo:
        parent = lineage[todo.pop()]
        if parent.id not in found:
            found[parent.id] = parent
            todo.extend(parent.parents)
    return list(found.values())
