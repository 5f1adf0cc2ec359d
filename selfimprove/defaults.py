"""What happens where no plugin answers: the identity of each optional verb."""

from __future__ import annotations

from collections.abc import Sequence

from selfimprove.hooks import Scores, hookimpl
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial
from selfimprove.run import Run


class Defaults:
    """Registered first, so that every plugin is asked before it."""

    @hookimpl(trylast=True)
    def prepare(self, root: Candidate) -> Candidate:
        return root

    @hookimpl(trylast=True)
    def apply(self, edits: Sequence[Edit], lineage: Lineage) -> Sequence[Trial]:
        return [Trial(e, lineage[e.parents[0]].derive(len(lineage), i)) for i, e in enumerate(edits)]

    @hookimpl(trylast=True)
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> Sequence[Candidate]:
        return [t.candidate for t, r in zip(trials, rewards, strict=True) if r.score is not None]

    @hookimpl(trylast=True)
    def evaluate(self) -> Scores:
        return []

    @hookimpl(trylast=True)
    def should_stop(self) -> str | None:
        return None

    @hookimpl
    def teardown(self, run: Run) -> None:
        run.close()
