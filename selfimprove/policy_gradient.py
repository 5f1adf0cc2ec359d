"""Policy gradients on groups of rollouts: RLOO, GRPO and Dr. GRPO, which differ in their advantages and in what a token's loss weighs.

    A_i    = advantage of rollout i within its group            (`ADVANTAGES`)
    ρ_it   = π(y_it) / π_sampled(y_it)
    loss   = Σ_i Σ_t w_i (−min(ρ_it A_i, clip(ρ_it) A_i) + β KL(π ‖ π_ref))

The steps themselves are the engine's (`models/reinforce.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Lora, Objective, Reinforce, Sample, Score
from selfimprove.payloads import Rollout
from selfimprove.records import Candidate, Evaluation, Lineage, Part, Trial
from selfimprove.run import Run

EPSILON = 1e-4
"""What GRPO's standard deviation is kept away from zero with, as in TRL."""


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Each reward minus the mean of the others (Ahmadian et al. 2024, arXiv 2402.14740).  (G,) -> (G,)"""
    centred: np.ndarray = rewards - rewards.mean()
    return centred * len(rewards) / max(1, len(rewards) - 1)


def grpo(rewards: np.ndarray) -> np.ndarray:
    """Centred and scaled within the group (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).  (G,) -> (G,)"""
    spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
    scaled: np.ndarray = (rewards - rewards.mean()) / (spread + EPSILON)
    return scaled


def dr_grpo(rewards: np.ndarray) -> np.ndarray:
    """Centred only: scaling favours questions that are nearly always or never answered (Liu et al. 2025, arXiv 2503.20783).  (G,) -> (G,)"""
    centred: np.ndarray = rewards - rewards.mean()
    return centred


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


@dataclass
class PolicyGradient:
    """One child per parent: its policy after some steps on its rollouts. The optimizer's moments are the part ``policy.optimizer``.

    A group whose rewards are all equal has no advantage and is left out, unless a KL term learns from it too.

    Args:
        algorithm: ``rloo`` (a sequence's loss is the sum over its tokens), ``grpo`` (their mean) or ``dr_grpo`` (their sum over `longest`).
        lora: the adapter's shape and optimizer, as a mapping of the fields of `selfimprove.models.Lora`: `batch` rollouts a step, `epochs`
            passes over all of them.
        clip_low, clip_high: how far the ratio of new to old probability counts.
        beta: weight of the KL divergence from the reference.
        reference: ``root``, or ``previous``, the policy that the rollouts were sampled from.
        longest: the constant that Dr. GRPO divides by: the most tokens of a rollout.
    """

    lora: Lora | Mapping[str, Any]
    algorithm: str = "rloo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    reference: str = "root"
    longest: int = 64

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.algorithm not in ADVANTAGES:
            raise ConfigError(f"updater.algorithm is one of {', '.join(ADVANTAGES)}; got {self.algorithm!r}")
        if self.reference not in ("root", "previous"):
            raise ConfigError(f"updater.reference is root or previous; got {self.reference!r}")
        if self.longest < 1:
            raise ConfigError(f"updater.longest is at least 1; got {self.longest}")
        if not isinstance(self.lora, Lora):
            try:
                self.lora = Lora(**{**self.lora, "targets": tuple(self.lora["targets"])})
            except (TypeError, KeyError) as e:
                raise ConfigError(f"updater.lora does not fit: {e}; its fields are {', '.join(Lora.__dataclass_fields__)}") from e
        Reinforce(Part("model", ""), (), self.lora, self.objective(1.0))  # it refuses what cannot be done, before anything runs

    def objective(self, temperature: float) -> Objective:
        return Objective(self.clip_low, self.clip_high, self.beta, temperature)

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        advantages = group_advantages(trials, rewards, ADVANTAGES[self.algorithm])
        chosen = [(t, a) for t, a in zip(trials, advantages, strict=True) if a is not None and (a or self.beta) and t.edit.payload.ids]
        requests: list[tuple[Candidate, Reinforce]] = []
        for parent_id in dict.fromkeys(t.edit.parents[0] for t, _ in chosen):
            parent = lineage[parent_id]
            own = [(t.edit.payload, a) for t, a in chosen if t.edit.parents[0] == parent_id]
            count = sum(t.edit.parents[0] == parent_id and a is not None for t, a in zip(trials, advantages, strict=True))
            requests.append((parent, self.request(run, lineage, parent, own, count)))
        made = run.models.reinforce([r for _, r in requests])
        return [
            parent.derive(len(lineage), **{"policy": m.policy, "policy.optimizer": m.optimizer})
            for (parent, _), m in zip(requests, made, strict=True)
        ]

    def request(self, run: Run, lineage: Lineage, parent: Candidate, rollouts: Sequence[tuple[Rollout, float]], count: int) -> Reinforce:
        """What trains a parent on its rollouts with their advantages.

        Args:
            count: rollouts that were rewarded, those without an advantage included: a step's loss is a mean over its share of them.
        """
        assert isinstance(self.lora, Lora)
        policy = parent.parts["policy"]
        references = self._references(run, lineage.root.parts["policy"], [r for r, _ in rollouts])
        share = min(self.lora.batch, len(rollouts)) * count / len(rollouts)  # of all rollouts, how many a step stands for
        samples = tuple(
            Sample(r.prompt, r.text, r.ids, r.logprobs, (float(a),) * len(r.ids), (self._weight(r) / share,) * len(r.ids), ref, r.chat)
            for (r, a), ref in zip(rollouts, references, strict=True)
        )
        [temperature] = {r.temperature for r, _ in rollouts}
        seed = run.seed_for("update", len(lineage), parent.id)
        return Reinforce(policy, samples, self.lora, self.objective(temperature), parent.parts.get("policy.optimizer"), seed)

    def _weight(self, rollout: Rollout) -> float:
        return {"rloo": 1.0, "grpo": 1.0 / len(rollout.ids), "dr_grpo": 1.0 / self.longest}[self.algorithm]

    def _references(self, run: Run, root: Part, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
        """The log-probabilities of every rollout's tokens under the reference; empty without a KL term."""
        if not self.beta:
            return [()] * len(rollouts)
        if self.reference == "previous":
            return [r.logprobs for r in rollouts]
        return [x.logprobs for x in run.models.score([as_score(root, r) for r in rollouts])]

    def expected(self, run: Run) -> dict[str, float]:
        """The most tokens of one round's steps, roughly, for `selfimprove plan`."""
        assert isinstance(self.lora, Lora)
        expected: Callable[[Run], Mapping[str, float]] | None = getattr(run.roles.get("editor"), "expected", None)
        return {"trained_tokens": 1.5 * expected(run).get("generated_tokens", 0.0) * self.lora.epochs} if expected else {}


def as_score(policy: Part, rollout: Rollout) -> Score:
    """The request for the log-probabilities of a rollout's own tokens under a policy."""
    return Score(policy, rollout.prompt, rollout.text, rollout.chat, rollout.ids, rollout.temperature, by_token=True)


def group_advantages(trials: Sequence[Trial], rewards: Sequence[Evaluation], advantage: Callable[[np.ndarray], np.ndarray]) -> list[float | None]:
    """The advantage of every trial within its group, whose measurable members may be fewer than all; None without a finite reward."""
    groups: dict[str, list[int]] = {}
    for i, (trial, reward) in enumerate(zip(trials, rewards, strict=True)):
        if reward.finite:
            groups.setdefault(trial.edit.group, []).append(i)
    found: list[float | None] = [None] * len(trials)
    for members in groups.values():
        scores = np.array([rewards[i].score for i in members], dtype=np.float64)
        values = advantage(scores) if np.ptp(scores) else np.zeros(len(members))  # rounding is no advantage
        for i, value in zip(members, values.tolist(), strict=True):
            found[i] = value
    return found
