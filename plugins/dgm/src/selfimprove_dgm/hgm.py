"""HGM (Wang et al. 2025): Thompson sampling over clades, and one more task for one agent wherever expanding can wait.

The paper chooses at every step between expanding and evaluating. A round here is one expansion and the evaluations until the next
one, in the same order, so the two halves are a selector and an evaluator, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfimprove.code import CodeStore
from selfimprove.errors import ConfigError
from selfimprove.hooks import Scores, hookimpl
from selfimprove.records import Candidate, Evaluation, Lineage, Trial
from selfimprove.run import Run
from selfimprove_dgm.archive import Archive
from selfimprove_dgm.genome import PART
from selfimprove_dgm.grade import measured


class CladeThompson:
    """The agent whose clade (it and all its descendants) has the highest draw of Beta(1 + solved, 1 + failed)."""

    needs_scores = True

    def __init__(self) -> None:
        self._archive = Archive()

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        archive = self._archive.follow(lineage)
        drawn = run.rng("select", len(lineage)).beta(1 + archive.column("clade_won"), 1 + archive.column("clade_lost"))  # (N,)
        return [lineage[archive.ids[int(np.argmax(drawn))]]]


class ExpandOrEvaluate:
    """Single tasks of single agents, chosen by Thompson sampling over agents, until evaluations^exponent ≥ agents − 1.

    Args:
        exponent: 0.6 in the paper.
        tasks: of the training functions, those that an agent can be measured on.
    """

    needs = (PART,)
    uses_labels = True

    def __init__(self, exponent: float = 0.6, tasks: int = 60) -> None:
        if not 0 < exponent <= 1 or not 1 <= tasks <= 60:
            raise ConfigError(f"evaluator.exponent is in (0, 1] and tasks between 1 and 60; got {exponent} and {tasks}")
        self.exponent, self.tasks = exponent, tasks

    @hookimpl
    def evaluate(self, candidates: Sequence[Candidate], trials: Sequence[Trial], lineage: Lineage, run: Run) -> Scores:
        store = CodeStore(run.folder)
        if candidates and not trials:  # a measurement outside the run
            return [(c.id, measured(store.get(c.parts[PART]), run.task.evaluation, run)) for c in candidates]
        items, agents = run.task.train[: self.tasks], [*lineage, *candidates]
        place = {c.id: i for i, c in enumerate(agents)}
        done: list[set[str]] = [set() for _ in agents]
        won, lost = np.zeros(len(agents)), np.zeros(len(agents))  # (N,) each
        for i in range(len(lineage)):
            for name, evaluation in lineage.round(i).scores:
                at = place[name]
                done[at] |= evaluation.per_item.keys()
                won[at] += sum(evaluation.per_item.values())
                lost[at] += len(evaluation.per_item) - sum(evaluation.per_item.values())
        scores: list[tuple[str, Evaluation]] = []
        while (won.sum() + lost.sum()) ** self.exponent < len(agents) - 1 or not (won + lost).any():
            drawn = run.rng("evaluate", len(lineage), len(scores)).beta(1 + won, 1 + lost)  # (N,)
            unfinished = np.array([len(d) < len(items) for d in done])  # (N,)
            if not unfinished.any():
                break
            at = int(np.argmax(np.where(unfinished, drawn, -1.0)))
            left = [i for i in items if i.id not in done[at]]
            item = left[int(run.rng("evaluate", "task", agents[at].id, len(done[at])).integers(len(left)))]
            found = measured(store.get(agents[at].parts[PART]), [item], run)
            if found.score is None:  # it ran when it was made; from now on it counts as a failure
                found = Evaluation(0.0, per_item={item.id: 0.0})
            scores.append((agents[at].id, found))
            done[at].add(item.id)
            won[at] += found.score or 0.0
            lost[at] += 1 - (found.score or 0.0)
        return scores
