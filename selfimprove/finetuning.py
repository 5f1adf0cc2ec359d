"""Updaters that fine-tune a policy on rollouts: on the good ones (SFT), or on good ones against bad ones (DPO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Document, Lora, Pair, Prefer, Train
from selfimprove.payloads import Rollout
from selfimprove.records import Candidate, Evaluation, Lineage, Part, Trial
from selfimprove.run import Run


@dataclass
class SFT:
    """One child per parent: its policy, or the root's, trained to write the rollouts that were kept.

    L = −Σ_i 1[r_i > τ] log π(y_i | x_i)

    With `restart` and a verifier's reward it is the M-step of STaR (Zelikman et al. 2022, arXiv 2203.14465, section 3.1: the base model is
    trained anew each round) and of ReST-EM (Singh et al. 2023, arXiv 2312.06585, section 3: so does it, on at most 10 solutions a problem).
    Equal texts of a question are kept once. A rollout that the length limit cut is none to learn from: its end would be learnt as one.

    Args:
        lora: the adapter, as a mapping of the fields of `selfimprove.models.Lora`; it is merged.
        threshold: the reward τ that a rollout has to exceed.
        keep: rollouts kept per question, the best rewarded first; 0 keeps all.
        restart: train from the root instead of from the parent.
    """

    lora: Lora | Mapping[str, Any]
    threshold: float = 0.5
    keep: int = 0
    restart: bool = False

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ConfigError(f"updater.keep is at least 0; got {self.keep}")
        self.lora = Lora.of(self.lora, merge=True)

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        assert isinstance(self.lora, Lora)
        requests: list[tuple[Candidate, Train]] = []
        taught = self.taught(trials, rewards, lineage, run)
        for parent_id in dict.fromkeys(p for p, _ in taught):
            parent = lineage[parent_id]
            start = (lineage.root if self.restart else parent).parts["policy"]
            documents = tuple(d for p, d in taught if p == parent_id)
            requests.append((parent, Train(start, documents, self.lora, run.seed_for("update", len(lineage), parent_id))))
        trained = run.models.train([r for _, r in requests])
        return [parent.derive(len(lineage), policy=t.policy) for (parent, _), t in zip(requests, trained, strict=True)]

    def taught(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> list[tuple[str, Document]]:
        """What is learnt, with the parent that learns it: the rollouts that were kept."""
        return [(t.edit.parents[0], as_document(t.edit.payload)) for t in self.kept(trials, rewards)]

    def kept(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[Trial]:
        """The trials to learn from, question after question: the best rewarded first, ties in order."""
        found = []
        for group in complete(trials, rewards).values():
            good = sorted((pair for pair in group if pair[0] > self.threshold), key=lambda pair: -pair[0])
            distinct = {t.edit.payload.text: t for _, t in reversed(good)}  # of equal texts the best rewarded
            best = [t for _, t in good if distinct[t.edit.payload.text] is t]
            found += best[: self.keep or None]
        return found


@dataclass
class DPO:
    """One child per parent: its policy, trained to prefer the best rollout of each question to the worst.

    L = −mean log σ(β (log π(y_w | x) / π_ref(y_w | x) − log π(y_l | x) / π_ref(y_l | x)))

    Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7), by TRL's DPOTrainer. A question whose best and worst
    are equally good teaches nothing. A rollout that the length limit cut is neither.

    Args:
        lora: the adapter, as a mapping of the fields of `selfimprove.models.Lora`; it is merged.
        beta: how near the policy is kept to the reference.
        reference: ``previous``, the parent's policy (iterative DPO), or ``root``.
        margin: what the best one's reward has to exceed the worst one's by.
    """

    lora: Lora | Mapping[str, Any]
    beta: float = 0.1
    reference: str = "previous"
    margin: float = 0.0

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.reference not in ("previous", "root"):
            raise ConfigError(f"updater.reference is previous or root; got {self.reference!r}")
        if self.margin < 0:
            raise ConfigError(f"updater.margin is at least 0; got {self.margin}")
        self.lora = Lora.of(self.lora, merge=True)
        Prefer(Part("model", ""), Part("model", ""), (), self.lora, self.beta)  # it refuses what cannot be done, before anything runs

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        assert isinstance(self.lora, Lora)
        requests: list[tuple[Candidate, Prefer]] = []
        pairs = self.pairs(trials, rewards, run)
        for parent_id in dict.fromkeys(p for p, _ in pairs):
            parent = lineage[parent_id]
            policy = parent.parts["policy"]
            reference = policy if self.reference == "previous" else lineage.root.parts["policy"]
            own = tuple(pair for p, pair in pairs if p == parent_id)
            requests.append((parent, Prefer(policy, reference, own, self.lora, self.beta, run.seed_for("update", len(lineage), parent_id))))
        trained = run.models.prefer([r for _, r in requests])
        return [parent.derive(len(lineage), policy=t.policy) for (parent, _), t in zip(requests, trained, strict=True)]

    def pairs(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], run: Run) -> list[tuple[str, Pair]]:
        """What is preferred to what, with the parent that wrote it."""
        found = []
        for group in complete(trials, rewards).values():
            (best, chosen), (worst, rejected) = max(group, key=lambda pair: pair[0]), min(group, key=lambda pair: pair[0])
            if best - worst > self.margin and chosen.edit.payload.text != rejected.edit.payload.text:
                r = chosen.edit.payload
                found.append((chosen.edit.parents[0], Pair(r.prompt, r.text, rejected.edit.payload.text, r.chat)))
        return found


def as_document(rollout: Rollout) -> Document:
    """A rollout as a text to learn."""
    return Document(rollout.text, rollout.prompt, rollout.chat)


def complete(trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> dict[str, list[tuple[float, Trial]]]:
    """The rollouts with an end, a text and a finite reward, with that reward, by group."""
    groups: dict[str, list[tuple[float, Trial]]] = {}
    for trial, reward in zip(trials, rewards, strict=True):
        if reward.finite and reward.score is not None and trial.edit.payload.finished and trial.edit.payload.text.strip():
            groups.setdefault(trial.edit.group, []).append((float(reward.score), trial))
    return groups
