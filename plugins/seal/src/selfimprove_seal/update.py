"""ReST-EM (Singh et al. 2023, arXiv 2312.06585; SEAL, section 3.1): keep the good edits, and train on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Candidate, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.models import Document, Lora, Train
from selfimprove.records import Edit
from selfimprove_seal.editor import SelfEdit
from selfimprove_seal.statistics import by_edit


@dataclass
class ReSTEM:
    """One child: the parent, trained to write the edits that were kept.

    Args:
        lora: the M-step's adapter, as a mapping of the fields of `selfimprove.models.Lora`; it is merged.
        keep: edits kept per context, best first.
        threshold: keep only edits whose reward is above this; null keeps the best whatever they are.
        restart: train from the root instead of from the parent.
        distinct: leave out a context whose edits all have the same reward: nothing was learnt about them.
    """

    lora: Lora | Mapping[str, Any]
    keep: int = 1
    threshold: float | None = None
    restart: bool = False
    distinct: bool = False

    consumes = (SelfEdit,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ConfigError(f"updater.keep is at least 1; got {self.keep}")
        if not isinstance(self.lora, Lora):
            try:
                self.lora = Lora(**{**self.lora, "targets": tuple(self.lora["targets"]), "merge": True})
            except (TypeError, KeyError) as e:
                raise ConfigError(f"updater.lora does not fit: {e}; its fields are {', '.join(Lora.__dataclass_fields__)}") from e

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        assert isinstance(self.lora, Lora)
        children = []
        kept = self.kept(trials, rewards)
        for parent_id in dict.fromkeys(e.parents[0] for e in kept):
            parent = lineage[parent_id]
            start = (lineage.root if self.restart else parent).parts["policy"]
            documents = tuple(Document(c, p) for e in kept if e.parents[0] == parent_id for p, c in e.payload.turns if c.strip())
            seed = run.seed_for("update", len(lineage), parent_id)
            [trained] = run.models.train([Train(start, documents, self.lora, seed)])
            children.append(parent.derive(len(lineage), policy=trained.policy))
        return children

    def kept(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[Edit]:
        """The edits to train on, context after context: the highest mean reward over replicates first, ties in order."""
        groups: dict[str, list[tuple[float, Edit]]] = {}
        for edit, values in by_edit(trials, rewards):
            if values and math.isfinite(sum(values)):
                groups.setdefault(edit.group, []).append((sum(values) / len(values), edit))
        found: list[Edit] = []
        for group in groups.values():
            scores = {s for s, _ in group}
            if self.distinct and len(scores) == 1 and len(group) > 1:
                continue
            best = sorted(group, key=lambda pair: -pair[0])[: self.keep]
            found += [e for s, e in best if self.threshold is None or s > self.threshold]
        return found
