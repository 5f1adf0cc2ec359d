"""Objects that hold objects: a rewarder made of rewarders, an updater made of updaters.

They are plugins like any other, and hold plugins like any other: what the inner ones declare (`uses_labels`, `consumes`,
`needs`, …) is what the outer one declares, and an inner hook still names only the arguments that it uses.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove import payloads
from selfimprove.errors import AdmissionError, ConfigError, ContractError, StorageError
from selfimprove.hooks import hookimpl
from selfimprove.identity import digest
from selfimprove.records import Candidate, Evaluation, Lineage, Round, Trial, decode_evaluation, encode_evaluation
from selfimprove.run import Run
from selfimprove.storage import append_line, read_lines


def ask(plugin: Any, hook: str, **arguments: Any) -> Any:
    """The answer of a plugin's hook, called with the arguments that it names."""
    method = getattr(plugin, hook)
    return method(**{name: arguments[name] for name in _names(method.__func__ if inspect.ismethod(method) else method)})


@functools.cache
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name != "self")


class Composed:
    """What the plugins inside declare, declared by the one outside.

    Args:
        hook: the hook that every one of them has to implement.
        inners: the plugins inside.

    Raises: AdmissionError, where one of them does not implement it, or no payload type suits all of them.
    """

    def __init__(self, hook: str, inners: Sequence[Any]) -> None:
        self.inners = tuple(inners)
        if not self.inners:
            raise ConfigError(f"{_name(self)} wants at least one plugin inside; got none")
        for inner in self.inners:
            if not callable(getattr(inner, hook, None)):
                raise AdmissionError(f"{_name(self)} wants plugins that implement `{hook}`; {_name(inner)} does not")
        self.consumes = self._consumed()

    @property
    def uses_labels(self) -> bool:
        return any(getattr(i, "uses_labels", False) for i in self.inners)

    @property
    def needs_scores(self) -> bool:
        return any(getattr(i, "needs_scores", False) for i in self.inners)

    @property
    def gives_credit(self) -> bool:
        return all(getattr(i, "gives_credit", False) for i in self.inners)

    def check_roles(self, roles: Mapping[str, Any]) -> None:
        """What every plugin inside checks."""
        for inner in self.inners:
            if hasattr(inner, "check_roles"):
                inner.check_roles(roles)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for i in self.inners for part in getattr(i, "needs", ())))

    @property
    def produces(self) -> tuple[type, ...] | None:
        """The union; None where an inner plugin leaves it open."""
        declared = [getattr(i, "produces", None) for i in self.inners]
        return None if None in declared else tuple(dict.fromkeys(kind for kinds in declared for kind in kinds or ()))

    def key(self) -> Any:
        """What the results depend on, besides the trial. Raises: AdmissionError, where an inner plugin does not say."""
        return [type(self).__name__, [_key(self, i) for i in self.inners]]

    @hookimpl
    def prepare(self, root: Candidate, run: Run) -> Candidate | None:
        """The first answer of the plugins inside, as a manager would take it."""
        for inner in self.inners:
            if hasattr(inner, "prepare"):
                found: Candidate | None = ask(inner, "prepare", root=root, run=run)
                if found is not None:
                    return found
        return None

    def _consumed(self) -> tuple[type, ...] | None:
        """The payload types that every plugin inside accepts; None where all leave it open."""
        accepted: tuple[type, ...] | None = None
        owner = ""
        for inner in self.inners:
            declared: tuple[type, ...] | None = getattr(inner, "consumes", None)
            if declared is None:
                continue
            if accepted is None:
                accepted, owner = declared, _name(inner)
                continue
            both = tuple(dict.fromkeys([a for a in accepted if issubclass(a, declared)] + [d for d in declared if issubclass(d, accepted)]))
            if not both:
                raise AdmissionError(
                    f"{_name(self)}: {owner} consumes {_types(accepted)}, but {_name(inner)} consumes {_types(declared)}; "
                    "no edit suits both, so choose plugins that meet"
                )
            accepted = both
        return accepted


class Cached(Composed):
    """A rewarder that measures equal trials once in a run: same payload, same parts, same replicate.

    What was measured is kept in the run folder, and is free from the next round on. Within its own round it is measured
    again after a resume (from the finished tiles), so that a killed run has charged what an unbroken one has.

    Args:
        inner: a rewarder whose value of a trial depends on that trial alone; it says so by a method `key()`, which returns
            what else the value depends on (its configuration).

    Raises: AdmissionError, for a rewarder without `key()`.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__("reward", [inner])
        self.inner = inner
        self._key = digest(_name(inner), _key(self, inner))
        self._path = Path()
        self._known: dict[str, tuple[int, Evaluation]] = {}  # the round that measured it, and what

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        self._open(run.folder / f"cached-{self._key}.jsonl")
        names = [self._identity(t) for t in trials]
        new = {n: t for n, t in zip(names, trials, strict=True) if n not in self._known or self._known[n][0] >= len(lineage)}
        measured = dict(zip(new, rewards_of(self.inner, list(new.values()), lineage, run), strict=True)) if new else {}
        fresh = {n: e for n, e in measured.items() if n not in self._known}
        if fresh:
            append_line(self._path, json.dumps([len(lineage), {n: encode_evaluation(e) for n, e in fresh.items()}]))
            self._known.update({n: (len(lineage), e) for n, e in fresh.items()})
        return [measured[n] if n in measured else self._known[n][1] for n in names]

    def _open(self, path: Path) -> None:
        if path != self._path:
            self._path, self._known = path, {}
            for number, line in enumerate(read_lines(path), 1):
                try:
                    made, found = json.loads(line)
                    self._known.update({n: (int(made), decode_evaluation(e)) for n, e in found.items()})
                except (ValueError, LookupError, TypeError, AttributeError, ContractError) as e:
                    raise StorageError(f"{path}, line {number} holds no evaluations ({e}); restore it from a copy, or delete the line") from e

    def _identity(self, trial: Trial) -> str:
        parts = {name: part.digest for name, part in trial.candidate.parts.items()}
        return digest(payloads.encode(trial.edit.payload), parts, trial.replicate, trial.error)


class Staged(Composed):
    """Rewarders in a row: the next one measures the trials whose score reached the threshold of the one before.

    A trial's evaluation is that of the last stage that measured it; the metric ``stage`` says which, counted from 0.

    Args:
        stages: rewarders, the cheapest first.
        threshold: the score to reach, one for all stages or one for each but the last.
    """

    def __init__(self, stages: Sequence[Any], threshold: float | Sequence[float]) -> None:
        super().__init__("reward", stages)
        count = len(self.inners) - 1
        self.thresholds = [float(threshold)] * count if isinstance(threshold, int | float) else [float(t) for t in threshold]
        if len(self.thresholds) != count:
            raise ConfigError(f"Staged wants one threshold, or {count} for {count + 1} stages; got {len(self.thresholds)}")

    def key(self) -> Any:
        return [*super().key(), self.thresholds]

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        found: list[Evaluation] = [Evaluation.failed("not measured")] * len(trials)
        going = list(range(len(trials)))
        for number, stage in enumerate(self.inners):
            if not going and number:
                break
            rewards = rewards_of(stage, [trials[i] for i in going], lineage, run)
            for i, reward in zip(going, rewards, strict=True):
                found[i] = dataclasses.replace(reward, metrics={**reward.metrics, "stage": float(number)})
            if number < len(self.thresholds):
                going = [i for i in going if (s := found[i].score) is not None and s >= self.thresholds[number]]
        return found


class WeightedSum(Composed):
    """The weighted sum of several rewarders' scores; without a score where one of them has none.

    Every term's score is the metric ``<number>.<class name>``. `per_item` and `credit` are summed where all terms cover the same
    items and steps, and left out elsewhere; experience and artifacts are collected.
    """

    def __init__(self, terms: Sequence[Any], weights: Sequence[float]) -> None:
        super().__init__("reward", terms)
        self.weights = [float(w) for w in weights]
        if len(self.weights) != len(self.inners):
            raise ConfigError(f"WeightedSum wants one weight per term; got {len(self.weights)} weights for {len(self.inners)} terms")

    def key(self) -> Any:
        return [*super().key(), self.weights]

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        columns = [rewards_of(term, trials, lineage, run) for term in self.inners]
        return [self._summed(row) for row in zip(*columns, strict=True)]

    def _summed(self, row: Sequence[Evaluation]) -> Evaluation:
        names = [f"{i}.{_name(term)}" for i, term in enumerate(self.inners)]
        metrics = {f"{n}.{m}": v for n, e in zip(names, row, strict=True) for m, v in e.metrics.items()}
        metrics |= {n: e.score for n, e in zip(names, row, strict=True) if e.score is not None}
        artifacts = {f"{n}.{a}": v for n, e in zip(names, row, strict=True) for a, v in e.artifacts.items()}
        missing = [f"{n}: {e.error}" for n, e in zip(names, row, strict=True) if e.score is None]
        same_items = all(e.per_item.keys() == row[0].per_item.keys() for e in row)
        same_steps = all(len(e.credit) == len(row[0].credit) for e in row)
        return Evaluation(
            score=None if missing else self._sum([e.score for e in row]),
            metrics=metrics,
            per_item={i: self._sum([e.per_item[i] for e in row]) for i in row[0].per_item} if same_items else {},
            credit=tuple(self._sum(step) for step in zip(*(e.credit for e in row), strict=True)) if same_steps else (),
            experience=tuple(x for e in row for x in e.experience),
            artifacts=artifacts,
            error="; ".join(missing) if missing else None,
        )

    def _sum(self, values: Sequence[Any]) -> float:
        return float(sum(w * v for w, v in zip(self.weights, values, strict=True)))


class Sharded(Composed):
    """A rewarder that is given at most `size` trials at a time, and never a part of a group.

    Groups are trials whose edits share a non-empty `group`, and the replicates of one edit; a group larger than `size` is a
    shard of its own.
    """

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__("reward", [inner])
        if size < 1:
            raise ConfigError(f"Sharded wants a size of at least 1; got {size}")
        self.inner, self.size = inner, size

    @hookimpl
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]:
        found: dict[int, Evaluation] = {}
        for shard in self.shards(trials):
            found |= zip(shard, rewards_of(self.inner, [trials[i] for i in shard], lineage, run), strict=True)
        return [found[i] for i in range(len(trials))]

    def shards(self, trials: Sequence[Trial]) -> list[list[int]]:
        """Positions of the trials, by shard; in input order where groups stand together."""
        groups: dict[str | int, list[int]] = {}
        for i, trial in enumerate(trials):
            groups.setdefault(trial.edit.group or id(trial.edit), []).append(i)
        shards: list[list[int]] = []
        for group in groups.values():
            if not shards or len(shards[-1]) + len(group) > self.size:
                shards.append([])
            shards[-1] += group
        return shards


class PerPart(Composed):
    """One updater per part, in order, making one child together: ``PerPart(policy=…, reward_model=…)``.

    The first updater that answers makes the drafts. Every later one sees them as the youngest candidates of its lineage (an
    average of policies uses the new policy), and returns one child for each, in order, or none to leave its part alone. From each
    updater only its own part is taken, with what belongs to it (``policy.optimizer`` goes with ``policy``).
    """

    def __init__(self, **updaters: Any) -> None:
        super().__init__("update", list(updaters.values()))
        self.updaters = updaters

    @hookimpl
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]:
        drafts: list[Candidate] = []
        for part, updater in self.updaters.items():
            draft_lineage = lineage + Round(children=tuple(drafts)) if drafts else lineage
            made = list(ask(updater, "update", trials=trials, rewards=rewards, lineage=draft_lineage, run=run) or ())
            if not made:
                continue
            if drafts and len(made) != len(drafts):
                raise ContractError(
                    f"PerPart: {_name(updater)} ({part}) returned {len(made)} candidates for {len(drafts)} drafts; return one each, in order, or none"
                )
            befores = drafts or [_only_parent(c, lineage, part) for c in made]
            drafts = [_taken(part, before, child, first=not drafts) for before, child in zip(befores, made, strict=True)]
        return drafts


def rewards_of(rewarder: Any, trials: Sequence[Trial], lineage: Lineage, run: Run) -> list[Evaluation]:
    """One evaluation per trial from an inner rewarder. Raises: ContractError, where it gives another number of them."""
    rewards = ask(rewarder, "reward", trials=trials, lineage=lineage, run=run)
    if rewards is None or len(rewards) != len(trials):
        got = "None" if rewards is None else f"{len(rewards)} evaluations"
        raise ContractError(f"{_name(rewarder)}.reward returned {got} for {len(trials)} trials; return one evaluation per trial, in order")
    return list(rewards)


def _only_parent(child: Candidate, lineage: Lineage, part: str) -> Candidate:
    if not child.parents or child.parents[0] not in lineage:
        raise ContractError(f"PerPart: the updater of {part} returned a child with parents {child.parents}; a child needs parents from the lineage")
    return lineage[child.parents[0]]


def _taken(part: str, before: Candidate, child: Candidate, *, first: bool) -> Candidate:
    """`before` with the part that `child` brings; a child of the same parents as the first draft."""
    own = {name: p for name, p in child.parts.items() if name == part or name.startswith(f"{part}.")}
    parents = child.parents if first else before.parents
    return dataclasses.replace(before.derive("part", part, child.id, **own), parents=parents)


def _key(outer: Any, inner: Any) -> Any:
    if not callable(getattr(inner, "key", None)):
        raise AdmissionError(
            f"{_name(outer)} wants a plugin whose result for a trial depends on that trial alone; {_name(inner)} does not say so "
            "with a method `key()` that returns its configuration; give it one, or use it without a cache"
        )
    return inner.key()


def _name(plugin: Any) -> str:
    return type(plugin).__name__


def _types(kinds: Sequence[type]) -> str:
    return ", ".join(k.__name__ for k in kinds)
