"""Paired differences between two arms: how large, how certain, and how many seeds would be enough.

Items are nested in tasks, tasks in seeds. Tasks are fixed (a suite names them), seeds and items are drawn. An arm's grades are
`Grades`; two arms are compared on the seeds, tasks and items that both have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from selfimprove.errors import ConfigError

Grades = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Grades by task, seed and item."""
ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 200
_ROUNDING = 1e-9
"""Means closer than this are equal."""


@dataclass(frozen=True)
class Difference:
    """One arm minus another, over the seeds, tasks and items that both have."""

    estimate: float
    low: float
    high: float
    """The 95 % interval, of this comparison alone."""
    p: float
    """Two-sided, not corrected for other comparisons."""
    seeds: int
    items: int
    by_seed: tuple[float, ...]
    seed_variance: float
    """Of the estimate, that more seeds reduce."""
    item_variance: float
    """Of the estimate, that only more items reduce; 0 where every seed has items of its own."""

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.seed_variance + self.item_variance)

    def interval(self, alpha: float) -> tuple[float, float]:
        """What holds the true difference with probability 1 − alpha."""
        half = float(stats.t.ppf(1 - alpha / 2, self.seeds - 1)) * self.standard_error
        return self.estimate - half, self.estimate + half


def difference(one: Grades, other: Grades) -> Difference:
    """The paired difference with its interval and p.

    A hierarchical bootstrap of infinitely many draws, which for means is a formula: seeds are drawn with replacement and keep their items
    (Davison and Hinkley 1997, section 3.8: drawing items again would count their noise twice, because the seeds' means already hold it).
    Where seeds share items, what the items add is the variance of drawing items minus that of drawing single grades (Cameron, Gelbach and
    Miller 2011, two-way clustering). Two corrections for few seeds: the bootstrap's variance is n/(n−1) times larger, and the interval and p go
    by Student's t with n−1 degrees of freedom instead of the normal distribution. Where all seeds agree, see `_unseen_variance`.

    Raises: ConfigError, where there are not two common seeds.
    """
    tables = _tables(one, other)
    seeds = len(next(iter(tables.values()), np.empty((0, 0))))
    if seeds < 2:
        raise ConfigError(f"a comparison needs two seeds that both arms finished; these have {seeds}")
    by_seed = np.mean([np.nanmean(t, axis=1) for t in tables.values()], axis=0)  # (S,)
    estimate = float(by_seed.mean())
    seed_variance = float(np.var(by_seed, ddof=1)) / seeds if np.ptp(by_seed) > _ROUNDING else 0.0
    item_variance = 0.0
    for table in filter(_shared, tables.values()):
        item_variance += max(0.0, _item_variance(table)) / len(tables) ** 2
    if seed_variance + item_variance < _ROUNDING**2:
        unseen = [(_shared(t), _unseen_variance(t) / len(tables) ** 2) for t in tables.values()]
        seed_variance = math.fsum(v for shared, v in unseen if not shared)  # every seed brings items of its own
        item_variance = math.fsum(v for shared, v in unseen if shared)
    items = sum(int(np.isfinite(t).sum()) for t in tables.values())
    found = Difference(estimate, estimate, estimate, 1.0, seeds, items, tuple(map(float, by_seed)), seed_variance, item_variance)
    low, high = found.interval(ALPHA)
    return dataclasses.replace(found, low=low, high=high, p=float(2 * stats.t.sf(abs(estimate) / found.standard_error, seeds - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """The p values, corrected for their number (Holm 1979): the family of all is wrong once with probability alpha at most."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def probability_of_improvement(one: Grades, other: Grades) -> float:
    """The probability that a seed of one arm beats a seed of the other, ties counted half, the mean over tasks.

    That of Agarwal et al. 2021 (arXiv 2108.13264, section 4.3) and of `rliable`, the Mann-Whitney statistic of unpaired seeds.
    """
    found = []
    for task in one:
        if task in other:
            x, y = ([float(np.mean(list(items.values()))) for items in arm[task].values()] for arm in (one, other))
            if x and y:
                found.append(float(stats.mannwhitneyu(x, y).statistic) / (len(x) * len(y)))
    return float(np.mean(found)) if found else float("nan")


def power(effect: float, found: Difference, seeds: int | None = None, alpha: float = ALPHA) -> float:
    """The probability that a true difference of `effect` would be found with so many seeds (those of the comparison where None).

    The distribution of t under the effect, averaged over what the true variance may be given that few seeds estimated it.
    """
    n = seeds or found.seeds
    quantiles = (np.arange(60) + 0.5) / 60
    df = found.seeds - 1
    seed_variance = found.seed_variance * found.seeds / n * df / stats.chi2.ppf(quantiles, df)  # (60,) what it may truly be
    error = np.sqrt(seed_variance + found.item_variance)
    estimated = np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))  # (60,) of the true error, what n seeds will estimate
    limit = stats.t.ppf(1 - alpha / 2, n - 1) * estimated
    shift = (abs(effect) / error)[:, None]
    return float(np.mean(stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift)))


def more_seeds(effect: float, found: Difference, wanted: float = POWER, alpha: float = ALPHA) -> int | None:
    """How many seeds to add to find a true difference of `effect` with probability `wanted`; None where `MOST_SEEDS` are not enough."""
    if power(effect, found, MOST_SEEDS, alpha) < wanted:
        return None
    low, high = found.seeds, MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, found, middle, alpha) >= wanted else (middle + 1, high)
    return low - found.seeds


def _tables(one: Grades, other: Grades) -> dict[str, np.ndarray]:
    """One minus other by task, (S, I) with nan where a seed does not have an item; seeds that both have in all common tasks."""
    tasks = [t for t in one if t in other]
    seeds = sorted(set.intersection(*(set(one[t]) & set(other[t]) for t in tasks))) if tasks else []
    tables = {}
    for task in tasks:
        common = [{i: g - other[task][s][i] for i, g in one[task][s].items() if i in other[task][s]} for s in seeds]
        if not all(common):
            raise ConfigError(f"two arms of task {task!r} have no item in common; give them the same task overrides")
        items = {i: n for n, i in enumerate(dict.fromkeys(i for c in common for i in c))}
        tables[task] = np.full((len(seeds), len(items)), np.nan)
        for row, values in zip(tables[task], common, strict=True):
            row[[items[i] for i in values]] = list(values.values())
    return tables


def _shared(table: np.ndarray) -> bool:
    """Whether seeds have items in common."""
    return bool((np.isfinite(table).sum(axis=0) > 1).any())


def _unseen_variance(table: np.ndarray) -> float:
    """Of a task's mean whose seeds agree exactly: that of its items and, because no spread seen is not no spread, of one more for and one against."""
    seen = table[np.isfinite(table)]
    most = float(np.abs(seen).max()) or 1.0  # two arms that never differ: by a whole grade they could
    return float(np.var([*seen, most, -most])) / len(seen)


def _item_variance(table: np.ndarray) -> float:
    """What drawing shared items adds to the variance of a task's mean, beyond the noise of single grades where its seeds show that.  (S, I) -> ()"""
    mask = np.isfinite(table)
    values = np.where(mask, table, 0.0)
    seeds, items = table.shape
    rows = np.nanmean(table, axis=1, keepdims=True)
    columns = np.nanmean(table, axis=0, keepdims=True)
    influence = (np.where(mask, values - rows, 0.0) / mask.sum(axis=1, keepdims=True)).sum(axis=0) / seeds  # (I,) of an item, on the mean
    rest = np.where(mask, values - rows - columns + values[mask].mean(), 0.0)
    free = max(1, (seeds - 1) * (items - 1))
    single = float((rest**2).sum() / free / mask.sum())
    whole: float = float((influence**2).sum()) * items / max(1, items - 1)
    return whole - (single if np.ptp(rows) > _ROUNDING else 0.0)
