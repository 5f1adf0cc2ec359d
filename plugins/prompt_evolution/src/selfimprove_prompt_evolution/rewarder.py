"""What an instruction is worth on the questions that its parent failed on when it wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from selfimprove import Evaluation, Run, Trial, hookimpl
from selfimprove.rollouts import replies
from selfimprove_prompt_evolution.editor import Instruction


class Gain:
    """accuracy(trial) − accuracy(parent) on the edit's minibatch (GEPA, algorithm 1)."""

    consumes = (Instruction,)
    needs = ("policy", "prompt")
    uses_labels = True

    @hookimpl
    def reward(self, trials: Sequence[Trial], run: Run) -> Sequence[Evaluation]:
        known = {q.id: (i, q) for i in run.task.train for q in i.questions}
        rows = replies(run, [(t.candidate, [known[q] for q in t.edit.payload.before]) for t in trials])
        return [
            Evaluation(fmean(a.grade for a in row) - fmean(t.edit.payload.before.values()), per_item={a.question.id: a.grade for a in row})
            if row
            else Evaluation.failed("its parent was asked nothing")  # what cannot be measured says why
            for t, row in zip(trials, rows, strict=True)
        ]
