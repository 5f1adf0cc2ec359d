"""CMA-ES over the weights with which adapters are mixed, layer by layer (in the manner of Akiba et al. 2024, arXiv 2403.13187).

    m, C, σ ← everything that was tried until now
    w_1 … w_n ~ N(m, σ²C)                              (`CMAMerge`)
    F_i = fitness of the model + Σ_k w_ik · adapter_k  (any fitness)
    child = the model + Σ_k m_k · adapter_k            (`MixtureMean`), with m after these

The distribution is no state of the plugin: it is told anew what the lineage holds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfimprove import Candidate, Edit, Evaluation, Lineage, Run, Trial, hookimpl
from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.models import Mix, Perturb
from selfimprove.payloads import payload
from selfimprove.records import Part


@payload("mixture")
@dataclass(frozen=True, slots=True)
class Mixture:
    """How much of each adapter each group of layers gets. (K, G)"""

    weights: tuple[tuple[float, ...], ...]


@dataclass
class Adapters:
    """What is mixed: adapters that others made, and random low-rank directions.

    Args:
        folders: adapters in PEFT's format, such as `selfimprove export RUN CANDIDATE FOLDER --adapter` writes.
        directions: random directions besides: low-rank noise of the model's weights, of standard deviation `sigma`.
        rank, targets: of the random directions.
        groups: groups of neighbouring layers that have weights of their own.
    """

    folders: Sequence[Path] = ()
    directions: int = 0
    sigma: float = 0.002
    rank: int = 1
    targets: Sequence[str] = ()
    groups: int = 6

    def __post_init__(self) -> None:
        if self.directions < 0 or self.groups < 1:
            raise ConfigError(f"editor wants directions >= 0 and groups >= 1; got {self.directions} and {self.groups}")
        if not self.folders and not self.directions:
            raise ConfigError(
                "there is nothing to mix; give adapters with `editor.folders=[FOLDER,FOLDER]`, or random ones with `editor.directions=4`"
            )
        self.noise(Part("model", ""), 0) if self.directions else None  # it refuses what is no noise, before anything runs

    @property
    def shape(self) -> tuple[int, int]:
        """Adapters and groups. (K, G)"""
        return len(self.folders) + self.directions, self.groups

    def noise(self, policy: Part, seed: int) -> Perturb:
        if self.rank < 1:
            raise ConfigError(f"editor.rank is at least 1; got {self.rank}")
        return Perturb(policy, seed, self.sigma, 1, self.rank, *([tuple(self.targets)] if self.targets else []))

    def parts(self, run: Run) -> tuple[Part, ...]:
        """The adapters, over the model that was opened."""
        seeds = [run.seed_for("direction", i) for i in range(self.directions)]
        return (*run.models.adopt([Path(f) for f in self.folders]), *run.models.derive([self.noise(run.models.root, s) for s in seeds]))

    def mixed(self, run: Run, mixtures: Sequence[Mixture]) -> list[Part]:
        """The policy that each mixture makes."""
        if not mixtures:
            return []
        parts = self.parts(run)
        return run.models.derive([Mix(run.models.root, parts, m.weights) for m in mixtures])


def applied(adapters: Adapters, edits: Sequence[Edit], lineage: Lineage, run: Run) -> list[Trial]:
    """The trials of edits that are mixtures."""
    policies = adapters.mixed(run, [e.payload for e in edits])
    return [Trial(e, lineage[e.parents[0]].derive(len(lineage), i, policy=p)) for i, (e, p) in enumerate(zip(edits, policies, strict=True))]


@dataclass
class CMAMerge(Adapters):
    """Mixtures from the distribution that CMA-ES has after everything in the lineage (Hansen 2016, arXiv 1604.00772).

    Args:
        population: mixtures per round; 0 takes CMA-ES's own number, 4 + 3 ln(weights) (Hansen 2016, table 1).
        spread: the standard deviation at the start.
        start: every weight at the start; None is an equal share of all adapters.
    """

    population: int = 0
    spread: float = 0.3
    start: float | None = None

    produces = (Mixture,)
    needs = ("policy",)
    _randn: _Stream = field(default_factory=lambda: _Stream(), init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.prod(self.shape) < 2:
            raise ConfigError("CMA-ES searches at least two weights; give more adapters or more groups of layers")
        if self.population < 0 or self.population == 1 or not self.spread > 0:
            raise ConfigError(f"editor wants population 0 or at least 2 and spread > 0; got {self.population} and {self.spread}")
        self.population = self.population or 4 + int(3 * math.log(math.prod(self.shape)))

    @hookimpl
    def prepare(self, run: Run) -> None:
        self.parts(run)  # a folder that holds no adapter is refused before the first round

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        search = self.search(lineage, run)
        return [Edit((parents[0].id,), self.mixture(x)) for x in self._asked(search, len(lineage), run)]

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        return applied(self, edits, lineage, run)

    def search(self, lineage: Lineage, run: Run, trials: Sequence[Trial] = (), rewards: Sequence[Evaluation] = ()) -> Any:
        """CMA-ES after all rounds of the lineage, and after these trials where there are any."""
        import cma

        k, g = self.shape
        start = 1.0 / k if self.start is None else self.start
        options = {"verbose": -9, "verb_log": 0, "seed": math.nan, "randn": self._randn, "popsize": self.population}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that it finds unusual
            search = cma.CMAEvolutionStrategy([start] * (k * g), self.spread, options)
        rounds = [(r.trials, r.rewards) for r in lineage.rounds] + ([(tuple(trials), tuple(rewards))] if trials else [])
        for number, (tried, found) in enumerate(rounds):
            self._asked(search, number, run)  # the numbers that these were drawn with
            scores = [r.score if r.finite else None for r in found]
            known = [s for s in scores if s is not None]
            if known and len(tried) == search.popsize:
                worst = min(known)
                search.tell([np.ravel(t.edit.payload.weights) for t in tried], [-(worst if s is None else s) for s in scores])
        return search

    def _asked(self, search: Any, number: int, run: Run) -> list[np.ndarray]:
        self._randn.source = run.rng("propose", number)
        asked: list[np.ndarray] = search.ask()
        return asked

    def mixture(self, x: np.ndarray) -> Mixture:
        return Mixture(tuple(tuple(row) for row in np.asarray(x, dtype=np.float64).reshape(self.shape).tolist()))


class _Stream:
    """What CMA-ES draws normal numbers with: the stream of the round, instead of numpy's global one."""

    source = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.source.standard_normal(shape)


class MixtureMean:
    """One child: the mixture at the mean of the distribution after the round. It goes with ``editor=cma_merge``."""

    consumes = (Mixture,)
    needs = ("policy",)

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """Raises: AdmissionError, where the editor has no such distribution."""
        if not isinstance(roles.get("editor"), CMAMerge):
            raise AdmissionError(
                f"MixtureMean (updater) needs the distribution of CMA-ES, and {type(roles.get('editor')).__name__} (editor) has none; "
                "choose editor=cma_merge, or another updater"
            )

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        editor: CMAMerge = run.roles["editor"]
        if not any(r.finite for r in rewards):
            return []
        mean = editor.mixture(editor.search(lineage, run, trials, rewards).mean)
        [policy] = editor.mixed(run, [mean])
        return [lineage[trials[0].edit.parents[0]].derive("mean", len(lineage), policy=policy)]
