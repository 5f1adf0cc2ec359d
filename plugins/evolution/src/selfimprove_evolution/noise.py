"""Evolution strategies on weights: a population of perturbations, and the step that their fitness makes.

    ε_1 … ε_n           from seeds, each with both signs                              (`WeightNoise`)
    F_i = fitness of θ + σ sign_i ε_i                                                 (any rewarder)
    θ ← θ + ascent((1/n) Σ_i shaped(F)_i sign_i ε_i)                                  (`EvolutionStrategy`)

Salimans et al. 2017 (arXiv 1703.03864) with ε of full rank; EGGROLL (arXiv 2511.16652) with ε = A Bᵀ/√r. Both divide the step by σ
once more on paper; here the learning rate holds that factor, as in Qiu et al. 2025 (arXiv 2509.24372).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfimprove import Candidate, Edit, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.models import Ascent, Evolve, Perturb, optimizer_of
from selfimprove.payloads import Noise
from selfimprove.records import Part


def z_scores(fitness: np.ndarray) -> np.ndarray:
    """Centred, and scaled to a standard deviation of 1 (Qiu et al. 2025).  (N,) -> (N,)"""
    scaled: np.ndarray = (fitness - fitness.mean()) / fitness.std()
    return scaled


def centred_ranks(fitness: np.ndarray) -> np.ndarray:
    """Ranks from −½ to ½ (Salimans et al. 2017, section 2.1); equals share the mean of their ranks.  (N,) -> (N,)"""
    _, place, counts = np.unique(fitness, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts + 1) / 2)[place]  # from 0
    shaped: np.ndarray = ranks / (len(fitness) - 1) - 0.5
    return shaped


SHAPINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"z_scores": z_scores, "centred_ranks": centred_ranks}


@dataclass
class WeightNoise:
    """Perturbations of each parent's weights, by seed; a trial is the perturbed parent, which costs nothing to make.

    Args:
        population: perturbations of each parent.
        sigma: the noise's standard deviation.
        rank: of the noise of each weight; 0 is full rank. Low-rank noise is an adapter, so a population is one batch.
        antithetic: try every noise with both signs; the two share a group.
        targets: the linear modules that get noise.
    """

    population: int
    sigma: float
    rank: int
    antithetic: bool
    targets: Sequence[str]

    produces = (Noise,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.population < 2 or (self.antithetic and self.population % 2):
            raise ConfigError(f"editor.population is at least 2, and even where noise is antithetic; got {self.population}")
        self.recipe(Part("model", ""), Noise(0))  # it refuses what is no noise, before anything runs

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        signs = (1, -1) if self.antithetic else (1,)
        return [
            Edit((parent.id,), Noise(seed, sign), f"{parent.id}/{seed}")
            for parent in parents
            for i in range(self.population // len(signs))
            for seed in [run.seed_for("propose", len(lineage), parent.id, i)]
            for sign in signs
        ]

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        parents = [lineage[e.parents[0]] for e in edits]
        perturbed = run.models.derive([self.recipe(p.parts["policy"], e.payload) for p, e in zip(parents, edits, strict=True)])
        return [
            Trial(e, parent.derive(len(lineage), i, policy=policy))
            for i, (e, parent, policy) in enumerate(zip(edits, parents, perturbed, strict=True))
        ]

    def recipe(self, policy: Part, noise: Noise) -> Perturb:
        return Perturb(policy, noise.seed, self.sigma, noise.sign, self.rank, tuple(self.targets))


@dataclass
class EvolutionStrategy:
    """One child per parent: its weights after a step along the noise of its perturbations, weighted by their shaped fitness.

    The child is a recipe of seeds and weights. The optimizer's moments are the part ``policy.optimizer``. Perturbations that could not be
    measured have no share; where the others are all equally fit there is nothing to follow, and no child.

    Args:
        ascent: learning rate and optimizer, as a mapping of the fields of `selfimprove.models.Ascent`.
        shaping: ``z_scores`` or ``centred_ranks``.
    """

    ascent: Ascent | Mapping[str, Any]
    shaping: str = "z_scores"

    consumes = (Noise,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        if self.shaping not in SHAPINGS:
            raise ConfigError(f"updater.shaping is one of {', '.join(SHAPINGS)}; got {self.shaping!r}")
        if not isinstance(self.ascent, Ascent):
            try:
                self.ascent = Ascent(**self.ascent)
            except TypeError as e:
                raise ConfigError(f"updater.ascent does not fit: {e}; its fields are {', '.join(Ascent.__dataclass_fields__)}") from e

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        measured = [(t, r.score) for t, r in zip(trials, rewards, strict=True) if r.finite and r.score is not None]
        steps: list[tuple[Candidate, Evolve]] = []
        for parent_id in dict.fromkeys(t.edit.parents[0] for t, _ in measured):
            own = [(t, score) for t, score in measured if t.edit.parents[0] == parent_id]
            fitness = np.array([score for _, score in own], dtype=np.float64)
            if np.ptp(fitness):
                steps.append((lineage[parent_id], self.step(lineage[parent_id], [t for t, _ in own], fitness)))
        policies = run.models.derive([step for _, step in steps])
        return [
            parent.derive(len(lineage), **{"policy": policy, "policy.optimizer": optimizer_of(policy)})
            for (parent, _), policy in zip(steps, policies, strict=True)
        ]

    def step(self, parent: Candidate, trials: Sequence[Trial], fitness: np.ndarray) -> Evolve:
        assert isinstance(self.ascent, Ascent)
        shares = SHAPINGS[self.shaping](fitness) / len(fitness)
        members = tuple(t.candidate.parts["policy"] for t in trials)
        return Evolve(parent.parts["policy"], members, tuple(shares.tolist()), self.ascent, parent.parts.get("policy.optimizer"))
