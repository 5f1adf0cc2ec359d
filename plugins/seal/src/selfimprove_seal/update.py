"""ReST-EM (Singh et al. 2023, arXiv 2312.06585; SEAL, section 3.1): keep the good edits, and train on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Candidate, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Document, Lora, Train
from selfimprove.records import Edit
from selfimprove.statistics import by_edit
from selfimprove_seal.editor import ContextEditor, SelfEdit


@dataclass
class ReSTEM:
    """One child: the parent, trained to write the edits that were kept.

    Args:
        lora: the M-step's adapter, as a mapping of the fields of `selfimprove.models.Lora`; it is merged.
        keep: edits kept per context, best first.
        threshold: keep only what has a reward above this; null keeps the best edits whatever they are.
        restart: train from the root instead of from the parent.
        distinct: leave out a context whose edits all have the same reward: nothing was learnt about them.
        lines: judge single lines instead of whole edits: of the lines that answered one prompt, `keep` are kept, those with the
            highest credit, which must be positive (or above `threshold`). Needs a rewarder that gives credit per line.
    """

    lora: Lora | Mapping[str, Any]
    keep: int = 1
    threshold: float | None = None
    restart: bool = False
    distinct: bool = False
    lines: bool = False

    consumes = (SelfEdit,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"updater.keep is at least 1; got {self.keep}")
        self.lora = Lora.of(self.lora, merge=True)

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where single lines are judged and the rewarder gives them no credit."""
        if self.lines and not getattr(roles["rewarder"], "gives_credit", False):
            raise AdmissionError(
                f"updater.lines wants credit for each line of an edit, and {type(roles['rewarder']).__name__} (rewarder) gives none; "
                "choose rewarder=accuracy, log_likelihood or accuracy_ties, or updater.lines=false"
            )

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        assert isinstance(self.lora, Lora)
        children = []
        turns = self.credited(trials, rewards) if self.lines else [(e.parents[0], t) for e in self.kept(trials, rewards) for t in e.payload.turns]
        for parent_id in dict.fromkeys(p for p, _ in turns):
            parent = lineage[parent_id]
            start = (lineage.root if self.restart else parent).parts["policy"]
            documents = tuple(Document(written, prompt) for p, (prompt, written) in turns if p == parent_id and written.strip())
            seed = run.seed_for("update", len(lineage), parent_id)
            [trained] = run.models.train([Train(start, documents, self.lora, seed)])
            children.append(parent.derive(len(lineage), policy=trained.policy))
        return children

    def expected(self, run: Run) -> dict[str, float]:
        """The most tokens of one M-step, roughly, for `selfimprove plan`."""
        editor = run.roles["editor"]
        if not isinstance(editor, ContextEditor):
            return {}  # another editor's prompts are not known before it has written
        assert isinstance(self.lora, Lora)
        prompts = [p for i in editor.round_items(run, 0) for p in editor.prompts(i)]
        return {"trained_tokens": sum(1.5 * len(p.split()) + 0.6 * editor.max_tokens for p in prompts) * self.keep * self.lora.epochs}

    def credited(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[tuple[str, tuple[str, str]]]:
        """The parent, prompt and text of the best lines, prompt after prompt."""
        groups: dict[tuple[str, str], dict[str, float]] = {}
        for trial, reward in zip(trials, rewards, strict=True):
            if reward.score is None:
                continue
            if len(reward.credit) != len(trial.edit.payload.turns):
                raise ConfigError(
                    f"updater.lines wants credit for each of an edit's {len(trial.edit.payload.turns)} lines, and the rewarder gave "
                    f"{len(reward.credit)}; choose rewarder=accuracy, log_likelihood or accuracy_ties, or updater.lines=false"
                )
            for (prompt, line), credit in zip(trial.edit.payload.turns, reward.credit, strict=True):
                lines = groups.setdefault((trial.edit.parents[0], prompt), {})
                lines[line] = max(credit, lines.get(line, credit))
        found = []
        for (parent, prompt), lines in groups.items():
            best = sorted(lines.items(), key=lambda pair: -pair[1])[: self.keep]
            found += [(parent, (prompt, line)) for line, credit in best if credit > (self.threshold or 0.0)]
        return found

    def kept(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[Edit]:
        """The edits to train on, context after context: the highest mean reward over replicates first, ties in order."""
        groups: dict[str, list[tuple[float, Edit]]] = {}
        for edit, values in by_edit(trials, rewards):
            if values and math.isfinite(sum(values)):
                groups.setdefault(edit.group, []).append((math.fsum(values) / len(values), edit))
        found: list[Edit] = []
        for group in groups.values():
            scores = {s for s, _ in group}
            if self.distinct and len(scores) == 1 and len(group) > 1:
                continue
            best = sorted(group, key=lambda pair: -pair[0])[: self.keep]
            found += [e for s, e in best if self.threshold is None or s > self.threshold]
        return found
