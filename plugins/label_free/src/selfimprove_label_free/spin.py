"""SPIN: self-play against the previous iterate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfimprove import Evaluation, Run, Trial
from selfimprove.errors import ConfigError
from selfimprove.finetuning import DPO
from selfimprove.models import Pair


@dataclass
class SPIN(DPO):
    """One child per parent: its policy π_t, trained to tell the real answers y from those that it wrote itself, y'.

    L = −mean log σ(β (log π(y | x) / π_t(y | x) − log π(y' | x) / π_t(y' | x)))

    Self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335, equation 4.7 with the logistic loss): the opponent is the iterate that wrote y',
    so the reference is always the previous policy. It reads the gold answers, and no reward.

    Args:
        answer: what a real answer looks like, with ``{answer}``.
    """

    answer: str = "{answer}"

    uses_labels = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{answer}" not in self.answer:
            raise ConfigError(f"updater.answer needs the field {{answer}}; got {self.answer!r}")
        if self.reference != "previous":
            raise ConfigError(f"SPIN plays against the previous policy; updater.reference is previous, got {self.reference!r}")

    def pairs(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], run: Run) -> list[tuple[str, Pair]]:
        questions = {q.id: q for i in run.task.train for q in i.questions}
        written = [(t.edit.parents[0], t.edit.payload) for t in trials if t.edit.payload.question in questions and t.edit.payload.finished]
        gold = run.task.labels(questions[q] for q in dict.fromkeys(r.question for _, r in written))
        real = [self.answer.replace("{answer}", gold[r.question][0]) for _, r in written]
        return [(parent, Pair(r.prompt, y, r.text, r.chat)) for (parent, r), y in zip(written, real, strict=True) if r.text.strip() != y.strip()]
