"""Policy gradients on groups of rollouts: RLOO, GRPO and Dr. GRPO, which differ in their advantages and in what a token's loss weighs.

    r_i    = reward of rollout i  (− β Σ_t log π_sampled(y_t)/π_ref(y_t), where the KL term is in the reward)
    A_it   = advantage of rollout i within its group            (`ADVANTAGES`)
    ρ_it   = π(y_it) / π_sampled(y_it), or Π_t of those, where a rollout's ratio is clipped as a whole
    loss   = Σ_i Σ_t w_i (−min(ρ_it A_it, clip(ρ_it) A_it) + β KL(π ‖ π_ref) + λ H(π))

The steps themselves are the engine's (`models/reinforce.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Interpolate, Lora, Objective, Reinforce, Sample, Score
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


Step = tuple[Rollout, tuple[float, ...], tuple[float, ...]]
"""A rollout, the advantage of each of its tokens, and their log-probabilities under the reference (empty without one)."""


@dataclass
class PolicyGradient:
    """One child per parent: its policy after some steps on its rollouts. The optimizer's moments are the part ``policy.optimizer``.

    A group whose rewards are all equal has no advantage and is left out, unless a KL or entropy term learns from it too.

    Args:
        algorithm: ``rloo`` (a sequence's loss is the sum over its tokens), ``grpo`` (their mean) or ``dr_grpo`` (their sum over `longest`).
        lora: the adapter's shape and optimizer, as a mapping of the fields of `selfimprove.models.Lora`: `batch` rollouts a step, `epochs`
            passes over all of them; `trainer` is ``bank``, or ``trl`` for TRL's GRPOTrainer.
        clip_low, clip_high: how far the ratio of new to old probability counts.
        ratio: whose: each ``token``'s (verl's, in which SRT is written), or that of the whole ``sequence`` (TRL's for RLOO), whose loss
            −min(ρA, clip(ρ)A) then stands once.
        beta: weight of the KL divergence from the reference.
        kl: where it stands: ``loss`` (GRPO; Schulman's k3, by token) or ``reward`` (RLOO; the sum of log π_sampled − log π_ref).
        reference: ``root``; ``previous``, the policy that the rollouts were sampled from; or ``ema``, the part ``policy.ema``: the average of
            all policies of this line of descent, which moves by 1 − `decay` towards the new one each round.
        decay: of that average.
        credit: what an advantage is made of: ``none``, the reward's score, for all tokens of a rollout; ``own``, each token's own credit from
            the reward; ``to_go``, the sum of its own and all later ones (GRPO with process supervision, arXiv 2402.03300, section 4.1.3).
        entropy: weight of the entropy in the loss; negative is an entropy bonus.
        longest: the constant that Dr. GRPO divides by: the most tokens of a rollout.
    """

    lora: Lora | Mapping[str, Any]
    algorithm: str = "rloo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    kl: str = "loss"
    reference: str = "root"
    decay: float = 0.9
    credit: str = "none"
    entropy: float = 0.0
    longest: int = 64
    ratio: str = "token"

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        for name, known in (
            ("algorithm", tuple(ADVANTAGES)),
            ("kl", ("loss", "reward")),
            ("reference", ("root", "previous", "ema")),
            ("credit", ("none", "own", "to_go")),
            ("ratio", ("token", "sequence")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"updater.{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.beta and self.kl == "reward" and self.reference == "previous":
            raise ConfigError("updater.kl=reward is 0 against reference=previous, which sampled the rollouts itself; choose root or ema")
        if self.ratio == "sequence" and (self.credit != "none" or self.algorithm != "rloo"):
            raise ConfigError("updater.ratio=sequence has one advantage and one loss for a rollout; choose algorithm=rloo and credit=none")
        if self.longest < 1 or not 0 <= self.decay <= 1:
            raise ConfigError(f"updater wants longest >= 1 and decay between 0 and 1; got {self.longest} and {self.decay}")
        self.lora = Lora.of(self.lora)
        Reinforce(Part("model", ""), (), self.lora, self.objective(1.0))  # it refuses what cannot be done, before anything runs

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where tokens shall have credit and the rewarder gives none."""
        if self.credit != "none" and not getattr(roles.get("rewarder"), "gives_credit", False):
            raise AdmissionError(
                f"updater.credit={self.credit} wants a credit for every token, and {type(roles.get('rewarder')).__name__} (rewarder) gives "
                "none; choose a rewarder that does, such as token_entropy, or updater.credit=none"
            )

    def objective(self, temperature: float) -> Objective:
        return Objective(self.clip_low, self.clip_high, self.beta if self.kl == "loss" else 0.0, temperature, self.entropy, self.ratio)

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        rewards = [r if t.edit.payload.ids else Evaluation.failed("it has no token") for t, r in zip(trials, rewards, strict=True)]
        references = self._references(run, lineage, trials, rewards)
        if self.beta and self.kl == "reward":
            rewards = [penalised(t.edit.payload, r, ref, self.beta) for t, r, ref in zip(trials, rewards, references, strict=True)]
        advantages = self.advantages(trials, rewards)
        learns = bool(self.entropy or (self.beta and self.kl == "loss"))  # from a rollout without an advantage too
        requests: list[tuple[Candidate, Reinforce]] = []
        for parent_id in dict.fromkeys(t.edit.parents[0] for t in trials):
            own = [
                (t.edit.payload, a, ref)
                for t, a, ref in zip(trials, advantages, references, strict=True)
                if a is not None and t.edit.parents[0] == parent_id
            ]
            if chosen := [step for step in own if learns or any(step[1])]:
                requests.append((lineage[parent_id], self.request(run, lineage, lineage[parent_id], chosen, len(own))))
        made = run.models.reinforce([r for _, r in requests])
        parts = [{"policy": m.policy, "policy.optimizer": m.optimizer} for m in made]
        if self.beta and self.reference == "ema":
            means = [Interpolate(self.anchor(lineage, parent), m.policy, 1 - self.decay) for (parent, _), m in zip(requests, made, strict=True)]
            parts = [{**p, "policy.ema": x.policy} for p, x in zip(parts, run.models.interpolate(means), strict=True)]
        return [parent.derive(len(lineage), **p) for (parent, _), p in zip(requests, parts, strict=True)]

    def advantages(self, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[tuple[float, ...] | None]:
        """The advantage of every token of every trial; None where there is no finite reward."""
        if self.credit == "none":
            found = group_advantages(trials, rewards, ADVANTAGES[self.algorithm])
            return [None if a is None else (a,) * len(t.edit.payload.ids) for t, a in zip(trials, found, strict=True)]
        return token_advantages(trials, rewards, ADVANTAGES[self.algorithm], self.credit == "to_go")

    def request(self, run: Run, lineage: Lineage, parent: Candidate, steps: Sequence[Step], count: int) -> Reinforce:
        """What trains a parent on its rollouts with their advantages.

        Args:
            count: rollouts that were rewarded, those without an advantage included: a step's loss is a mean over its share of them.
        """
        assert isinstance(self.lora, Lora)
        share = min(self.lora.batch, len(steps)) * count / len(steps)  # of all rollouts, how many a step stands for
        samples = tuple(
            Sample(r.prompt, r.text, r.ids, r.logprobs, a, (self._weight(r) / share,) * len(r.ids), ref if self.kl == "loss" else (), r.chat)
            for r, a, ref in steps
        )
        [temperature] = {r.temperature for r, _, _ in steps}
        seed = run.seed_for("update", len(lineage), parent.id)
        return Reinforce(parent.parts["policy"], samples, self.lora, self.objective(temperature or 1.0), parent.parts.get("policy.optimizer"), seed)

    def anchor(self, lineage: Lineage, parent: Candidate) -> Part:
        """The policy that a parent's children are kept near, of those that are not the parent's own."""
        root = lineage.root.parts["policy"]
        return parent.parts.get("policy.ema", root) if self.reference == "ema" else root

    def _weight(self, rollout: Rollout) -> float:
        return {"rloo": 1.0, "grpo": 1.0 / len(rollout.ids), "dr_grpo": 1.0 / self.longest}[self.algorithm]

    def _references(self, run: Run, lineage: Lineage, trials: Sequence[Trial], rewards: Sequence[Evaluation]) -> list[tuple[float, ...]]:
        """The log-probabilities of every measured rollout's tokens under the reference; empty without a KL term."""
        found: list[tuple[float, ...]] = [()] * len(trials)
        measured = [i for i, r in enumerate(rewards) if r.finite] if self.beta else []
        if self.reference == "previous":
            for i in measured:
                found[i] = trials[i].edit.payload.logprobs
            return found
        asked = [as_score(self.anchor(lineage, lineage[trials[i].edit.parents[0]]), trials[i].edit.payload) for i in measured]
        for i, x in zip(measured, run.models.score(asked), strict=True):
            found[i] = x.logprobs
        return found

    def expected(self, run: Run) -> dict[str, float]:
        """The most tokens of one round's steps, roughly, for `selfimprove plan`."""
        assert isinstance(self.lora, Lora)
        expected: Callable[[Run], Mapping[str, float]] | None = getattr(run.roles.get("editor"), "expected", None)
        return {"trained_tokens": 1.5 * expected(run).get("generated_tokens", 0.0) * self.lora.epochs} if expected else {}


def penalised(rollout: Rollout, reward: Evaluation, reference: Sequence[float], beta: float) -> Evaluation:
    """A reward less β times the KL estimate log π_sampled − log π_ref: its score less the sum over tokens, its credit less each token's own."""
    if not reward.finite or reward.score is None:
        return reward
    gaps = [beta * (a - b) for a, b in zip(rollout.logprobs, reference, strict=True)]
    credit = tuple(c - g for c, g in zip(reward.credit, gaps, strict=True)) if len(reward.credit) == len(gaps) else reward.credit
    return dataclasses.replace(reward, score=reward.score - sum(gaps), credit=credit)


def as_score(policy: Part, rollout: Rollout) -> Score:
    """The request for the log-probabilities of a rollout's own tokens under a policy."""
    temperature = rollout.temperature or 1.0  # greedy answers tell what their tokens had at 1
    return Score(policy, rollout.prompt, rollout.text, rollout.chat, rollout.ids, temperature, by_token=True)


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


def token_advantages(
    trials: Sequence[Trial], rewards: Sequence[Evaluation], advantage: Callable[[np.ndarray], np.ndarray], to_go: bool
) -> list[tuple[float, ...] | None]:
    """The advantage of every token among all tokens of its group, from the rewards' credit; None without a finite reward.

    Args:
        to_go: sum what is to come, the token's own included.

    Raises: ConfigError, where a reward has not one credit for every token.
    """
    groups: dict[str, list[int]] = {}
    for i, (trial, reward) in enumerate(zip(trials, rewards, strict=True)):
        if not reward.finite:
            continue
        if len(reward.credit) != len(trial.edit.payload.ids):
            raise ConfigError(
                f"updater.credit wants a credit for each of a rollout's {len(trial.edit.payload.ids)} tokens, and the rewarder gave "
                f"{len(reward.credit)}; choose a rewarder that gives them, such as token_entropy, or updater.credit=none"
            )
        groups.setdefault(trial.edit.group, []).append(i)
    found: list[tuple[float, ...] | None] = [None] * len(trials)
    for members in groups.values():
        flat = np.concatenate([np.array(rewards[i].credit, dtype=np.float64) for i in members])  # (N,)
        values = advantage(flat) if np.ptp(flat) else np.zeros(len(flat))
        for i, own in zip(members, np.split(values, np.cumsum([len(rewards[i].credit) for i in members])[:-1]), strict=True):
            found[i] = tuple((own[::-1].cumsum()[::-1] if to_go else own).tolist())
    return found
