"""MAP-Elites on islands (as in OpenEvolve), as a selector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfimprove.code import CodeStore
from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage
from selfimprove.run import Run
from selfimprove_dgm.archive import Archive
from selfimprove_dgm.genome import PART


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
        self._archive = Settled(islands)

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        archive = self._archive.reading(CodeStore(run.folder))
        archive.follow(lineage)
        migrates = self.migration and len(lineage) and len(lineage) % self.migration == 0
        chance = run.rng("select", len(lineage))
        chosen = []
        for i in range(self.parents):
            island = (len(lineage) * self.parents + i) % self.islands
            places = archive.elites(island)  # (E,)
            if migrates:
                places = np.concatenate([places, archive.elites((island + 1) % self.islands)])
            chosen.append(lineage[archive.ids[int(places[chance.integers(len(places))])]] if len(places) else lineage.root)
        return chosen


class Settled(Archive):
    """An archive whose agents live on islands, with two columns more.

    * ``home``: the island; −1 for the root, which belongs to all of them. (N,)
    * ``cell``: the number of the agent's cell, counted as they appear. (N,)
    """

    NAMES = (*Archive.NAMES, "home", "cell")

    def __init__(self, islands: int) -> None:
        self.islands = islands
        self._store: CodeStore | None = None
        self._known: dict[str, tuple[int, int]] = {}  # by digest of the code
        super().__init__()

    def reading(self, store: CodeStore) -> Settled:
        """This archive, which reads the code of agents that are new to it from a store."""
        self._store = store
        return self

    def elites(self, island: int) -> NDArray[Any]:
        """Places of the best agent of each of an island's cells, the oldest of equals, in the order of the cells.  (E,)"""
        score, home = self.score, self.column("home")
        here = np.flatnonzero(np.isfinite(score) & ((home == island) | (home < 0)))  # (M,)
        cells = self.column("cell")[here].astype(int)  # (M,)
        best = np.full(len(self._cells), -np.inf)
        np.maximum.at(best, cells, score[here])
        top = score[here] == best[cells]  # (M,)
        _, first = np.unique(cells[top], return_index=True)
        elites: NDArray[Any] = here[top][first]
        return elites

    def _start(self, root: Candidate | None) -> None:
        self._arrived = 0
        self._cells: dict[tuple[int, int], int] = {}
        super()._start(root)

    def _born(self, candidate: Candidate, parent: int) -> None:
        super()._born(candidate, parent)
        home, at = self._columns["home"], len(self) - 1
        if parent == 0:
            home[at] = self._arrived % self.islands
            self._arrived += 1
        else:
            home[at] = home[parent] if parent > 0 else -1
        self._columns["cell"][at] = self._cells.setdefault(self._cell(candidate), len(self._cells))

    def _cell(self, candidate: Candidate) -> tuple[int, int]:
        part = candidate.parts[PART]
        if part.digest not in self._known:
            assert self._store is not None
            self._known[part.digest] = cell(self._store.get(part))
        return self._known[part.digest]


def cell(tree: dict[str, str]) -> tuple[int, int]:
    """The number of operators of an agent, and the binary magnitude of its budget; 0 for what cannot be read."""
    operators = sum(name.startswith("operators/") and name.endswith(".py") for name in tree)
    try:
        return operators, int(json.loads(tree["config.json"])["budget"]).bit_length()
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return operators, 0
