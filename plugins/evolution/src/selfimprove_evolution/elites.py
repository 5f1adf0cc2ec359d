"""Quality and diversity of mixtures of adapters: MAP-Elites (Mouret and Clune 2015, arXiv 1504.04909).

    archive = the best candidate of every cell of behaviour, of all in the lineage   (`archive`)
    P = parents drawn from it                                                        (`Elites`)
    w = w_p + iso · N(0, I) + line · (w_q − w_p) · N(0, 1)                           (`IsoLine`)

Every measured trial is a child. The archive is no state: it is a view of the lineage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfimprove import Candidate, Edit, Lineage, Run, Trial, hookimpl
from selfimprove.errors import ConfigError
from selfimprove.models import Mix
from selfimprove_evolution.merging import Adapters, Mixture, applied


def archive(lineage: Lineage, measures: Mapping[str, Sequence[float]], cells: int) -> Any:
    """A pyribs archive of everything in the lineage that has a score; a solution is a position in the lineage.

    Args:
        measures: what is told apart: metrics of the score, each with its lowest and highest value; beyond these counts as the outermost cell.
        cells: per measure.

    Raises: ConfigError, where a score lacks a metric, or pyribs is not installed.
    """
    try:
        from ribs.archives import GridArchive
    except ImportError as missing:
        raise ConfigError("selector=elites needs pyribs; install it with `pip install 'selfimprove-evolution[map-elites]'`") from missing

    grid = GridArchive(solution_dim=1, dims=[cells] * len(measures), ranges=[tuple(r) for r in measures.values()], dtype=np.float64)
    position = {c.id: i for i, c in enumerate(lineage)}
    found = [(position[i], e) for r in lineage.rounds for i, e in r.scores if e.finite]
    for _, e in found:
        if lacking := [m for m in measures if m not in e.metrics]:
            raise ConfigError(
                f"selector.measures names {', '.join(lacking)}, and scores have {', '.join(sorted(e.metrics)) or 'no metrics'}; "
                "choose among these, with evaluator=reward_is_score"
            )
    if found:
        grid.add(
            solution=np.array([[float(p)] for p, _ in found]),
            objective=np.array([e.score for _, e in found]),
            measures=np.array([[e.metrics[m] for m in measures] for _, e in found]),
        )
    return grid


@dataclass
class Elites:
    """Candidates from the archive, each cell as likely as any other; the root while the archive is empty.

    Args:
        measures: metrics that tell candidates apart, each with its lowest and highest value.
        cells: per measure.
        parents: candidates per round, with repetition.
    """

    measures: Mapping[str, Sequence[float]]
    cells: int = 8
    parents: int = 16

    needs_scores = True

    def __post_init__(self) -> None:
        if self.cells < 1 or self.parents < 1 or not self.measures:
            raise ConfigError(f"selector wants cells >= 1, parents >= 1 and a measure; got {self.cells}, {self.parents} and {dict(self.measures)}")
        if wrong := [m for m, r in self.measures.items() if len(r) != 2 or not r[0] < r[1]]:
            raise ConfigError(f"selector.measures.{wrong[0]} wants [LOWEST, HIGHEST]; got {list(self.measures[wrong[0]])}")

    @hookimpl
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate]:
        elites = sorted(int(p) for p in archive(lineage, self.measures, self.cells).data("solution").ravel())
        if not elites:
            return [lineage.root]
        candidates = list(lineage)
        return [candidates[i] for i in run.rng("select", len(lineage)).choice(elites, size=self.parents)]


@dataclass
class IsoLine(Adapters):
    """Variations of the parents' mixtures (Vassiliades and Mouret 2018, arXiv 1804.03906); of the root, random mixtures.

    Args:
        population: mixtures per round; parents are taken in turn, each with a random second one.
        iso: the standard deviation of every weight.
        line: the standard deviation along the line to the second parent, as a share of their distance.
        spread: the standard deviation of random mixtures.
    """

    population: int = 16
    iso: float = 0.05
    line: float = 0.2
    spread: float = 1.0

    produces = (Mixture,)
    needs = ("policy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 1 or min(self.iso, self.line, self.spread) < 0:
            raise ConfigError(
                f"editor wants population >= 1, and iso, line and spread >= 0; got {self.population}, {self.iso}, {self.line} and {self.spread}"
            )

    @hookimpl
    def prepare(self, run: Run) -> None:
        self.parts(run)  # a folder that holds no adapter is refused before the first round

    @hookimpl
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]:
        chance, found = run.rng("propose", len(lineage)), []
        for i in range(self.population):
            one, other = parents[i % len(parents)], parents[int(chance.integers(len(parents)))]
            first, second = self._weights(one, run), self._weights(other, run)
            if first is None or second is None:
                weights, ids = self.spread * chance.standard_normal(self.shape), [one.id]
            else:
                weights = first + self.iso * chance.standard_normal(self.shape) + self.line * (second - first) * chance.standard_normal()
                ids = list(dict.fromkeys((one.id, other.id)))
            found.append(Edit(tuple(ids), Mixture(tuple(tuple(row) for row in weights.tolist()))))
        return found

    @hookimpl
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]:
        return applied(self, edits, lineage, run)

    def _weights(self, candidate: Candidate, run: Run) -> np.ndarray | None:
        """A candidate's mixture; None where it is none. (K, G)"""
        recipe = run.models.recipe(candidate.parts["policy"])
        return np.array(recipe.weights) if isinstance(recipe, Mix) and np.shape(recipe.weights) == self.shape else None
