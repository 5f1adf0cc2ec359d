"""Selectors over an archive of agents: DGM's, uniform and repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfimprove.compose import Composed, ask
from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage
from selfimprove.run import Run
from selfimprove_dgm.archive import Archive


class SigmoidNovelty:
    """`parents` draws with replacement, p ∝ σ(steepness·(score − midpoint)) · 1 / (1 + children) (DGM, appendix A).

    Agents without a score are not drawn, unless nobody has one; then it is the root.

    Args:
        parents: draws.
        steepness: λ of the paper.
        midpoint: α₀ of the paper, a number; ``top3``, the mean of the three best scores; or ``median``, where the scores are also
            divided by their median absolute deviation. The last two tell weak agents apart, which 0.5 does not.
    """

    needs_scores = True

    def __init__(self, parents: int = 2, steepness: float = 10.0, midpoint: float | Literal["top3", "median"] = 0.5) -> None:
        if parents < 1:
            raise ConfigError(f"selector.parents is at least 1; got {parents}")
        self.parents, self.steepness, self.midpoint = parents, steepness, midpoint
        self._archive = Archive()

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        archive = self._archive.follow(lineage)
        weights = self.weights(archive.score, archive.column("children"))  # (N,)
        if not weights.any():
            return [lineage.root] * self.parents
        edges = np.cumsum(weights)  # (N,)
        drawn = np.searchsorted(edges, run.rng("select", len(lineage)).random(self.parents) * edges[-1], side="right")
        return [lineage[archive.ids[min(int(i), len(archive) - 1)]] for i in drawn]

    def weights(self, score: NDArray[Any], children: NDArray[Any]) -> NDArray[Any]:
        """What each agent's probability is proportional to; 0 without a score.  (N,), (N,) -> (N,)"""
        known = np.isfinite(score)
        if not known.any():
            return np.zeros(len(score))
        middle, spread = self._middle(score[known])
        with np.errstate(over="ignore", invalid="ignore"):
            sigmoid = 1 / (1 + np.exp(-self.steepness * (score - middle) / spread))  # (N,)
        return np.where(known, sigmoid / (1 + children), 0.0)

    def _middle(self, scores: NDArray[Any]) -> tuple[float, float]:
        if self.midpoint == "top3":
            return float(np.mean(np.partition(scores, -min(3, len(scores)))[-3:])), 1.0
        if self.midpoint == "median":
            middle = float(np.median(scores))
            return middle, self.steepness * max(float(np.median(np.abs(scores - middle))), 0.02)
        return float(self.midpoint), 1.0


class Uniform:
    """`parents` draws with replacement among all agents of the lineage: the null arm."""

    def __init__(self, parents: int = 2) -> None:
        self.parents = parents
        self._archive = Archive()

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        ids = self._archive.follow(lineage).ids
        return [lineage[ids[int(i)]] for i in run.rng("select", len(lineage)).integers(len(ids), size=self.parents)]


class Repeated(Composed):
    """Another selector's choice, `times` times: of `Best` the greedy arm, of `Latest` the one without an archive."""

    def __init__(self, inner: Any, times: int = 2) -> None:
        super().__init__("select", [inner])
        if times < 1:
            raise ConfigError(f"selector.times is at least 1; got {times}")
        self.inner, self.times = inner, times

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        return list(ask(self.inner, "select", lineage=lineage, run=run)) * self.times
