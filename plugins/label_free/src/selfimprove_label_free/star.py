"""STaR: rationales that end with the right answer are learnt, those that the policy finds once it knows the answer included."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Evaluation, Lineage, Run, Trial
from selfimprove.errors import ConfigError
from selfimprove.finetuning import SFT
from selfimprove.graders import Answer
from selfimprove.models import Document
from selfimprove.rollouts import asking_among, asking_of


@dataclass
class STaR(SFT):
    """One child per parent: the base model, trained anew on the rationales ŷ_i whose answer is right, and on rationalisations ỹ_i.

    ŷ_i ~ π(· | x_i),  ỹ_i ~ π(· | x_i, the answer of i)  where no ŷ_i was right
    L = −Σ_i 1[ŷ_i right] log π_0(ŷ_i | x_i) − Σ_i 1[no ŷ_i right] 1[ỹ_i right] log π_0(ỹ_i | x_i)

    Self-taught reasoner (Zelikman et al. 2022, arXiv 2203.14465, algorithm 1): the hint is in the prompt that ỹ is written for and not in the one
    that it is learnt for, as if the policy had come to it by itself. A rationalisation that the length limit cut is none to learn from.

    Args:
        hint: the prompt of a question that was answered wrongly, with ``{prompt}`` and ``{answer}``; null switches rationalisation off, and
            then no label is read.
    """

    hint: str | None = "{prompt}\n({answer})"
    restart: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint is not None and (missing := [f for f in ("{prompt}", "{answer}") if f not in self.hint]):
            raise ConfigError(f"updater.hint needs the field {missing[0]}, or is null; got {self.hint!r}")

    @property
    def uses_labels(self) -> bool:
        return self.hint is not None

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where nobody says how questions are asked."""
        if self.hint is not None:
            asking_among(roles)

    def taught(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> list[tuple[str, Document]]:
        return [*super().taught(trials, rewards, lineage, run), *self.rationalised(trials, rewards, lineage, run)]

    def rationalised(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> list[tuple[str, Document]]:
        """What the policy wrote for the questions that it failed, told their answer; as many texts as have the right one."""
        if self.hint is None:
            return []
        questions = {q.id: q for i in run.task.train for q in i.questions}
        right = {t.edit.group for t, r in zip(trials, rewards, strict=True) if r.finite and r.score is not None and r.score > self.threshold}
        failed = {t.edit.group: t.edit for t in trials if t.edit.group not in right and t.edit.payload.question in questions}
        gold = run.task.labels(questions[e.payload.question] for e in failed.values())
        asking, requests = asking_of(run), []
        for group, edit in failed.items():
            prompt = self.hinted(edit.payload.prompt, gold[edit.payload.question][0])
            requests.append(asking.request(lineage[edit.parents[0]].parts["policy"], prompt, run.seed_for("rationalise", len(lineage), group)))
        written = list(zip(failed.values(), run.models.generate(requests), strict=True))
        grades = run.grader.grade([Answer(questions[e.payload.question].text, gold[e.payload.question], c.text) for e, c in written], run.ledger)
        return [
            (e.parents[0], Document(c.text, e.payload.prompt, e.payload.chat))
            for (e, c), grade in zip(written, grades, strict=True)
            if grade > self.threshold and c.finished and c.text.strip()
        ]

    def hinted(self, prompt: str, answer: str) -> str:
        """The prompt with the answer in it; neither is a template, whatever it says."""
        fields = {"prompt": prompt, "answer": answer}
        return re.sub(r"\{(prompt|answer)\}", lambda found: fields[found[1]], self.hint or "{prompt}")
