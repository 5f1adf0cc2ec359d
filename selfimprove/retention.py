"""Which candidates keep their weights on disk; the others are derived again where they are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage
from selfimprove.run import Run


@dataclass
class Retention:
    """The observer that prunes weights after every round.

    Args:
        every: write content every this many rounds; in between it is derived again after a resume.
        last: of the youngest candidates, keep this many.
        best: keep the candidate with the best score.
        spaced: keep the children of every this many rounds; 0 keeps none for that reason.
    """

    every: int = 1
    last: int = 2
    best: bool = True
    spaced: int = 0

    @hookimpl
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        if len(lineage) % self.every == 0:
            run.models.retain(part for c in self.kept(lineage) for part in c.parts.values() if part.kind in ("adapter", "weights"))

    def kept(self, lineage: Lineage) -> list[Candidate]:
        """The candidates whose content stays."""
        keep = list(islice(reversed(lineage), self.last))
        if self.best and (best := lineage.best()) is not None:
            keep.append(best)
        if self.spaced:
            for i in range(0, len(lineage), self.spaced):
                keep.extend(lineage.round(i).children)
        return list({c.id: c for c in keep}.values())
