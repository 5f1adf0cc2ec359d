"""What to do when the truth monitor sees a run collapse: stop, or go back to the last good candidate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.records import Candidate, Lineage
from selfimprove.truth import LABELLED, METRICS, truth_of


@dataclass(kw_only=True)
class Bounds:
    """Between what limits the metrics of the truth monitor are healthy.

    Those on ``accuracy``, ``gap`` or ``pseudo_label`` go by hidden labels: then whoever holds the bounds reads labels, and its arm is
    not label-free.

    Args:
        above: the most that a metric may be.
        below: the least that a metric may be.
        rise: the most that a metric may rise from the last round of a parent's parent to the parent's (each the mean of its round's rollouts).
            A bound on how fast a run moves finds the update that breaks it, where one on how far it went leaves room for long healthy runs.
    """

    above: Mapping[str, float] = field(default_factory=dict)
    below: Mapping[str, float] = field(default_factory=dict)
    rise: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted({*self.above, *self.below, *self.rise} - set(METRICS)):
            raise ConfigError(f"{type(self).__name__} bounds {', '.join(METRICS)}; got {', '.join(unknown)}")

    @property
    def uses_labels(self) -> bool:
        return bool(LABELLED & {*self.above, *self.below, *self.rise})

    def broken(self, lineage: Lineage, index: int) -> str | None:
        """The first bound that the rollouts of a round break; None where all hold, or are not measured."""
        one = lineage.round(index)
        position = index if index >= 0 else len(lineage) + index
        above = {p for c in one.parents for p in lineage[c].parents} if self.rise else set()
        return self._broken(truth_of(one), [m for p in above if (m := _measured(lineage, p, position))])

    def _broken(self, metrics: Mapping[str, float], before: Sequence[Mapping[str, float]]) -> str | None:
        for name, limit in self.above.items():
            if metrics.get(name, -math.inf) > limit:
                return f"truth/{name} is {metrics[name]:.3f}, above {limit:g}"
        for name, limit in self.below.items():
            if metrics.get(name, math.inf) < limit:
                return f"truth/{name} is {metrics[name]:.3f}, below {limit:g}"
        for name, limit in self.rise.items():
            rises = [metrics[name] - b[name] for b in before if name in metrics and name in b]
            if rises and min(rises) > limit:
                return f"truth/{name} is {metrics[name]:.3f} and rose by {min(rises):.3f} in one update, more than {limit:g}"
        return None

    def seen(self, lineage: Lineage) -> None:
        """Raises: ConfigError, where the last round had trials and the monitor saw nothing of it."""
        if len(lineage) and lineage.round(-1).trials and not truth_of(lineage.round(-1)):
            raise ConfigError(f"{type(self).__name__} goes by the truth monitor, and it saw no rollouts; add middleware=[truth], or choose another")


def _measured(lineage: Lineage, candidate: str, before: int) -> Mapping[str, float]:
    """What the monitor saw in the last round before this one in which a candidate was a parent."""
    return next((m for i in range(before - 1, -1, -1) if candidate in lineage.round(i).parents and (m := truth_of(lineage.round(i)))), {})


@dataclass(kw_only=True)
class Collapse(Bounds):
    """A guard that stops when a metric leaves its bounds, in `patience` rounds in a row.

    Args:
        above, below, rise: as of `Bounds`.
        patience: rounds in a row that must be out of bounds.
    """

    patience: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1:
            raise ConfigError(f"guard.collapse.patience is at least 1; got {self.patience}")

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        self.seen(lineage)
        if len(lineage) < self.patience:
            return None
        reasons = [self.broken(lineage, -1 - back) for back in range(self.patience)]
        return f"the run collapses: {reasons[0]}" if None not in reasons else None


@dataclass(kw_only=True)
class BeforeCollapse(Bounds):
    """A selector of the youngest candidate without a collapsed one among itself and its ancestors; the root, where even that collapsed.

    A candidate is judged by the rounds in which it was the parent, since it is its own rollouts that the monitor measures; one that never
    was a parent counts as healthy, and is found out in the round that it begins.
    """

    @hookimpl
    def select(self, lineage: Lineage) -> Sequence[Candidate]:
        self.seen(lineage)
        bad = self._fallen(lineage)
        return [next((c for c in reversed(lineage) if c.id not in bad), lineage.root)]

    def proven(self, lineage: Lineage) -> Candidate:
        """The youngest candidate whose own rollouts were healthy; the root, where there is none."""
        bad, parents = self._fallen(lineage), {p for i in range(len(lineage)) for p in lineage.round(i).parents}
        return next((c for c in reversed(lineage) if c.id in parents and c.id not in bad), lineage.root)

    def _fallen(self, lineage: Lineage) -> set[str]:
        """The candidates that collapsed, or descend from one."""
        bad = {p for i in range(len(lineage)) if self.broken(lineage, i) for p in lineage.round(i).parents}
        for candidate in lineage:  # parents come before their children
            if bad & set(candidate.parents):
                bad.add(candidate.id)
        return bad
