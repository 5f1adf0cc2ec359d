"""Selectors over an archive of agents: DGM's, uniform, repeated, and MAP-Elites islands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfimprove.code import CodeStore
from selfimprove.compose import Composed, ask
from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage
from selfimprove.run import Run
from selfimprove_dgm.archive import Archive
from selfimprove_dgm.genome import PART


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


class Islands:
    """MAP-Elites on islands: each island keeps the best agent of every cell, and a parent is drawn from one island's cells.

    A child lives where its parent does; children of the root go to the islands in turn. Every `migration` rounds, each island may
    also draw from the next one's elites. A cell is an agent's number of operators and the magnitude of its search budget.

    Args:
        islands: how many.
        parents: draws; draw i is from island (round · parents + i) mod islands.
        migration: rounds between migrations; 0 for never.
    """

    needs = (PART,)
    needs_scores = True

    def __init__(self, islands: int = 3, parents: int = 2, migration: int = 10) -> None:
        if islands < 1 or parents < 1 or migration < 0:
            raise ConfigError(f"islands and parents are at least 1 and migration at least 0; got {islands}, {parents} and {migration}")
        self.islands, self.parents, self.migration = islands, parents, migration
        self._archive = Archive()
        self._cells: dict[str, tuple[int, int]] = {}

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        archive = self._archive.follow(lineage)
        home = self.homes(archive)
        elites = self._elites(archive, home, lineage, CodeStore(run.folder))
        chance = run.rng("select", len(lineage))
        chosen = []
        for i in range(self.parents):
            island = (len(lineage) * self.parents + i) % self.islands
            places = elites[island]
            if self.migration and len(lineage) and len(lineage) % self.migration == 0:
                places = places + elites[(island + 1) % self.islands]
            chosen.append(lineage[archive.ids[places[int(chance.integers(len(places)))]]] if places else lineage.root)
        return chosen

    def homes(self, archive: Archive) -> list[int]:
        """The island of each agent; the root belongs to all of them (−1).  (N,)"""
        found = [-1]
        arrived = 0
        for parent in archive.parent[1:]:
            found.append(arrived % self.islands if parent == 0 else found[parent])
            arrived += parent == 0
        return found

    def _elites(self, archive: Archive, home: Sequence[int], lineage: Lineage, store: CodeStore) -> list[list[int]]:
        best: list[dict[tuple[int, int], int]] = [{} for _ in range(self.islands)]
        score = archive.score
        for i in np.flatnonzero(np.isfinite(score)).tolist():
            cell = self._cell(lineage[archive.ids[i]], store)
            for island in range(self.islands) if home[i] < 0 else (home[i],):
                rival = best[island].get(cell)
                if rival is None or score[i] > score[rival]:
                    best[island][cell] = i
        return [list(cells.values()) for cells in best]

    def _cell(self, candidate: Candidate, store: CodeStore) -> tuple[int, int]:
        part = candidate.parts[PART]
        if part.digest not in self._cells:
            self._cells[part.digest] = cell(store.get(part))
        return self._cells[part.digest]


def cell(tree: dict[str, str]) -> tuple[int, int]:
    """The number of operators of an agent, and the binary magnitude of its budget; 0 for what cannot be read."""
    operators = sum(name.startswith("operators/") and name.endswith(".py") for name in tree)
    try:
        return operators, int(json.loads(tree["config.json"])["budget"]).bit_length()
    except (KeyError, ValueError, TypeError):
        return operators, 0
