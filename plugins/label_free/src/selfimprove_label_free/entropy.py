"""EM-FT: an update that makes the policy's own distributions sharper, without any reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfimprove import Candidate, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.models import Lora, Objective, Reinforce, Sample
from selfimprove.payloads import Rollout
from selfimprove.records import Part


@dataclass
class EntropyMinimisation:
    """One child per parent: its policy after some steps that lower the entropy of its distributions on its own rollouts, whatever their reward.

    L = (1/N) Σ_i (1/T_i) Σ_t H(π(· | x_i, y_i,<t)),  H(p) = −Σ_j p_j log p_j  over the vocabulary

    EM-FT (Agarwal et al. 2025, arXiv 2505.15134, section 3.1). The gradient goes through the distributions and not through what was sampled, so
    it is no policy gradient. The optimizer's moments are the part ``policy.optimizer``.

    Args:
        lora: the adapter's shape and optimizer, as a mapping of the fields of `selfimprove.models.Lora`: `batch` rollouts a step, `epochs`
            passes over all of them.
    """

    lora: Lora | Mapping[str, Any]

    consumes = (Rollout,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        self.lora = Lora.of(self.lora)
        Reinforce(Part("model", ""), (), self.lora, Objective(entropy=1.0))  # it refuses what cannot be done, before anything runs

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        written = [(t.edit.parents[0], t.edit.payload) for t, r in zip(trials, rewards, strict=True) if r.score is not None and t.edit.payload.ids]
        requests = []
        for parent_id in dict.fromkeys(p for p, _ in written):
            requests.append((lineage[parent_id], self.request(run, lineage, lineage[parent_id], [r for p, r in written if p == parent_id])))
        made = run.models.reinforce([r for _, r in requests])
        return [
            parent.derive(len(lineage), **{"policy": m.policy, "policy.optimizer": m.optimizer})
            for (parent, _), m in zip(requests, made, strict=True)
        ]

    def request(self, run: Run, lineage: Lineage, parent: Candidate, rollouts: Sequence[Rollout]) -> Reinforce:
        """What trains a parent on its rollouts: no advantages, and the entropy at every token."""
        assert isinstance(self.lora, Lora)
        step = min(self.lora.batch, len(rollouts))
        samples = tuple(
            Sample(r.prompt, r.text, r.ids, r.logprobs, (0.0,) * len(r.ids), (1 / (step * len(r.ids)),) * len(r.ids), chat=r.chat) for r in rollouts
        )
        objective = Objective(temperature=rollouts[0].temperature or 1.0, entropy=1.0)
        seed = run.seed_for("update", len(lineage), parent.id)
        return Reinforce(parent.parts["policy"], samples, self.lora, objective, parent.parts.get("policy.optimizer"), seed)
