"""What a policy forgets: unrelated items, scored before and after, and a gate that passes over a child which lost too much.

A wrapper around `evaluate`, like the truth monitor: its findings stand in the round as an evaluation without a score, only metrics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Score
from selfimprove.records import Candidate, Evaluation, Lineage, Part
from selfimprove.run import Run

NOTE = "no score: how much of what it knew the policy still knows"
"""The error of the evaluation that carries the metrics."""
PREFIX = "forgetting/"
ITEMS = Path(__file__).with_name("forgetting.json")


@dataclass(frozen=True, slots=True)
class Probe:
    """A text and ways to go on, the first of which is right."""

    prompt: str
    answers: tuple[str, ...]


@dataclass
class Forgetting:
    """Metrics of every new policy on items that have nothing to do with the task, and, with a tolerance, a gate.

    * ``forgetting/loss``: minus the right answers' log-likelihood per token, in nats; the mean over items.
    * ``forgetting/accuracy``: how often the right answer is likelier, per token, than every wrong one.
    * ``forgetting/lost``: the loss minus the root's, of every policy but the root.

    The root is measured in the first round. A child that lost more than `tolerance` is rejected: it has no score, so it is never the best,
    and whoever is selected as a parent in its place is its nearest ancestor that was not.

    Args:
        tolerance: the most that ``lost`` may be, in nats per token; null measures only.
        items: a JSON file of items ``[text, right answer, wrong answer, …]``; null takes the 64 of `selfimprove/forgetting.json`.
    """

    tolerance: float | None = None
    items: Path | None = None

    _probes: tuple[Probe, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ConfigError(f"middleware.forgetting.tolerance is at least 0, or null; got {self.tolerance}")
        self._probes = probes(Path(self.items) if self.items else ITEMS)

    @hookimpl(wrapper=True)
    def evaluate(self, candidates: Sequence[Candidate], lineage: Lineage, run: Run) -> Generator[None, Any, Any]:
        scores = list((yield))
        root = lineage.root
        before = loss_of(lineage, root.id)
        found = []
        if before is None:
            measured = self.measure(run, root.parts["policy"])
            before = measured[f"{PREFIX}loss"]
            found.append((root.id, Evaluation(None, measured, error=NOTE)))
        for candidate in candidates:
            if candidate.id in lineage or "policy" not in candidate.parts:  # what is in the lineage was measured in its round
                continue
            metrics = self.measure(run, candidate.parts["policy"])
            metrics[f"{PREFIX}lost"] = lost = metrics[f"{PREFIX}loss"] - before
            rejected = self.tolerance is not None and lost > self.tolerance
            if rejected:
                reason = f"rejected: it lost {lost:.3f} nats per token on unrelated items, more than {self.tolerance:g}"
                scores = [(i, Evaluation(None, e.metrics, error=reason) if i == candidate.id else e) for i, e in scores]
            found.append((candidate.id, Evaluation(None, metrics, error=NOTE)))
        return [*scores, *found]

    @hookimpl(wrapper=True)
    def select(self, lineage: Lineage) -> Generator[None, Any, Any]:
        parents: Sequence[Candidate] = yield
        if self.tolerance is None:
            return parents
        kept = [self._kept(p, lineage) for p in parents]
        return list({p.id: p for p in kept}.values()) if kept != list(parents) else parents

    def measure(self, run: Run, policy: Part) -> dict[str, float]:
        """One policy on all items. Charges scored tokens."""
        asked = [Score(policy, p.prompt, answer) for p in self._probes for answer in p.answers]
        told = iter(run.models.score(asked))
        likely = [[next(told).per_token for _ in p.answers] for p in self._probes]
        return {
            f"{PREFIX}loss": -math.fsum(right for right, *_ in likely) / len(likely),
            f"{PREFIX}accuracy": sum(right > max(wrong) for right, *wrong in likely) / len(likely),
        }

    def _kept(self, parent: Candidate, lineage: Lineage) -> Candidate:
        """The candidate, or its nearest ancestor that was not rejected."""
        assert self.tolerance is not None
        while parent.parents and (metric(lineage, parent.id, "lost") or 0.0) > self.tolerance:
            parent = lineage[parent.parents[0]]
        return parent


def metric(lineage: Lineage, candidate_id: str, name: str) -> float | None:
    """What was measured of a candidate in its round (of the root, in the first); None where nothing was."""
    number = max(0, lineage.round_of(candidate_id))
    if number >= len(lineage):
        return None
    return next((e.metrics[f"{PREFIX}{name}"] for i, e in lineage.round(number).scores if i == candidate_id and f"{PREFIX}{name}" in e.metrics), None)


def loss_of(lineage: Lineage, candidate_id: str) -> float | None:
    return metric(lineage, candidate_id, "loss")


def probes(path: Path) -> tuple[Probe, ...]:
    """The items of a file. Raises: ConfigError, where it holds none."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not rows:
            raise ValueError("it holds no list of items")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, list) or len(row) < 3 or not all(isinstance(x, str) and x for x in row):
                raise ValueError(f"item {number} is no list of a text, a right answer and at least one wrong one")
            if row[1] in row[2:]:
                raise ValueError(f"item {number} has its right answer among the wrong ones")
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"middleware.forgetting.items={path} cannot be used ({e}); give a JSON file of lists [text, right answer, wrong answer, …]"
        ) from e
    return tuple(Probe(text, tuple(answers)) for text, *answers in rows)
