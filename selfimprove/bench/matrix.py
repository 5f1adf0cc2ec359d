"""The matrix of a suite: every arm on every task with every seed, null arms included, as cells keyed by their configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfimprove import config as configuration
from selfimprove import discovery
from selfimprove.bench.suite import AT_EQUAL_COST, NULLS, UNTRAINED, ArmEntry, Suite, TaskEntry
from selfimprove.config import Config
from selfimprove.errors import ConfigError
from selfimprove.identity import digest
from selfimprove.payloads import Text
from selfimprove.runfolder import flat

SAME = ("task", "grader", "model", "engine")
"""Groups that all arms of a task have in common: the null arms take them from its first strategy."""
ASKED = ("template", "chat", "max_tokens", "stop")
"""What of an `Asking` says how a model is asked; the rest says how it is decoded."""


@dataclass(frozen=True)
class Cell:
    """One run: an arm on a task with a seed."""

    arm: str
    task: str
    seed: int
    overrides: tuple[str, ...]
    key: str
    """The digest of its resolved configuration, so equal cells are run once."""


@dataclass
class Arm:
    """One row of the report on one task."""

    name: str
    task: str
    kind: str
    """``strategy``, or the null arm that it is."""
    of: tuple[str, ...] = ()
    """The strategies whose null arm it is, which a strategy may be as well; empty in a null arm where it is that of all of the task."""
    cells: list[Cell] = field(default_factory=list)
    configuration: dict[str, Any] = field(default_factory=dict)
    """With the first seed."""
    differs: dict[str, Any] = field(default_factory=dict)
    """Its configuration, as what differs from that of the task's first arm."""
    tasks: dict[int, Any] = field(default_factory=dict)
    """How its task is made, by seed."""

    @property
    def trained(self) -> bool:
        return self.kind not in UNTRAINED


@dataclass(frozen=True)
class Matrix:
    """All arms of a suite, and the null arms that could not be made, with the reason."""

    arms: tuple[Arm, ...]
    left_out: Mapping[str, str]
    base: Mapping[str, Mapping[str, Any]]
    """The configuration that `Arm.differs` differs from, by task."""

    @property
    def cells(self) -> list[Cell]:
        """Every cell once, seed by seed, strategies first: a benchmark that is stopped early has whole seeds."""
        ordered = sorted((c for a in self.arms for c in a.cells), key=lambda c: c.seed)
        return list({c.key: c for c in ordered}.values())

    @property
    def tasks(self) -> dict[str, Any]:
        """How every task is made, equal ones once, by what to call it."""
        made: dict[str, tuple[str, Any]] = {}
        for a in self.arms:
            for seed, node in a.tasks.items():
                made.setdefault(digest(node), (f"task {a.task}, seed {seed}", node))
        return dict(made.values())


def matrix(suite: Suite) -> Matrix:
    """The matrix of a suite; every configuration has been composed and checked. Raises: ConfigError, naming the arm."""
    arms: list[Arm] = []
    left_out: dict[str, str] = {}
    bases: dict[str, dict[str, Any]] = {}
    for task in suite.tasks:
        own = [a for a in suite.arms if not a.tasks or task.name in a.tasks]
        task = dataclasses.replace(task, overrides=(*_agreed(suite, task, own), *task.overrides))
        rows = [_arm(suite, task, a.name, "strategy", a.overrides, ()) for a in own]
        rows += [row for a in own for row in _nulls_of(suite, task, a, left_out)]
        same = [f"{g}={name}" for g in SAME if own and (name := rows[0].configuration["choices"].get(g))]
        asked = _asked(rows)
        for null in _of_a_task(task, rows, suite.nulls, left_out) if own else ():
            if null in UNTRAINED:
                rows.append(_arm(suite, task, null, null, (*same, *_untouched(suite, task, null), *asked, *task.untouched), ()))
            else:
                rows.append(_arm(suite, task, null, null, (*same, "strategy=supervised", *asked, *(task.supervised or ())), ()))
        _check_same(suite, rows)
        merged = _merged(suite, rows)
        if merged:
            bases[task.name] = _described(merged[0])
            for row in merged:
                row.differs = _differences(bases[task.name], _described(row))
        arms += merged
    _name(arms)
    if not any(a.cells for a in arms):
        raise ConfigError(f"suite {suite.name} has no cell; give it arms, tasks and seeds")
    return Matrix(tuple(arms), left_out, bases)


def _nulls_of(suite: Suite, task: TaskEntry, arm: ArmEntry, left_out: dict[str, str]) -> list[Arm]:
    """The null arms that are made of an arm."""
    rows = []
    composed = _composed(suite, task, arm.name, _overrides(suite, task, arm.overrides, suite.seeds[0], trained=True))
    if "random_reward" in suite.nulls:
        random = _wrapped(composed, "shuffled_rewards") if arm.random_reward is None else arm.random_reward
        rows.append(_arm(suite, task, "random_reward", "random_reward", (*arm.overrides, *random), (arm.name,)))
    if "random_edits" in suite.nulls:
        if reason := _not_shuffled(composed):
            left_out[f"{task.name}/random_edits ({arm.name})"] = reason
        else:
            random = _wrapped(composed, "shuffled_edits")
            rows.append(_arm(suite, task, "random_edits", "random_edits", (*arm.overrides, *random), (arm.name,)))
    return rows


def _of_a_task(task: TaskEntry, rows: Sequence[Arm], nulls: Sequence[str], left_out: dict[str, str]) -> list[str]:
    """The null arms that are made of a task; those that answer in words are left out where no text is an answer."""
    kinds = [n for n in nulls if n in UNTRAINED or (n == "supervised" and task.supervised is not None)]
    target = rows[0].configuration["task"]["_target_"]
    if getattr(configuration.located(target, "task", discovery.sources()), "in_words", True):
        return kinds
    if kinds:
        left_out[f"{task.name}/{', '.join(kinds)}"] = "no text can answer its questions, so a model cannot be asked them or trained on their answers"
    return []


def _wrapped(composed: Config, wrapper: str) -> tuple[str, ...]:
    return (f"middleware=[{','.join([*composed.choices['middleware'], wrapper])}]",)


def _agreed(suite: Suite, task: TaskEntry, arms: Sequence[ArmEntry]) -> tuple[str, ...]:
    """The options that some arms' strategies choose of what all arms have in common, and other strategies leave open: they are everybody's."""
    default = configuration.compose([]).choices
    found: dict[str, set[str]] = {g: set() for g in SAME}
    for arm in arms:
        words = _overrides(suite, task, arm.overrides, suite.seeds[0], trained=True)
        choices = _composed(suite, task, arm.name, words).choices
        for group in SAME:
            if choices[group] != default[group] and not any(w.startswith(f"{group}=") for w in words):
                found[group].add(choices[group])
    return tuple(f"{group}={names.pop()}" for group, names in found.items() if len(names) == 1)


def _not_shuffled(composed: Config) -> str | None:
    """Why edits of this configuration cannot exchange their texts, or None."""
    editor = composed.values.get("editor") or {}
    produced = getattr(configuration.located(editor["_target_"], "editor", discovery.sources()), "produces", None) if editor else None
    if produced is None or all(issubclass(p, Text) for p in produced):
        return None
    return f"its edits are {', '.join(p.__name__ for p in produced)}, which hold no text to exchange"


def _asked(rows: Sequence[Arm]) -> tuple[str, ...]:
    """How the first arm asks that says how it does, so that the untouched model is asked the same way."""
    parts = [part for row in rows for part in map(row.configuration.get, ("editor", "rewarder")) if isinstance(part, Mapping)]
    asking: Mapping[str, Any] = next((part["asking"] for part in parts if isinstance(part.get("asking"), Mapping)), {})
    return tuple(f"editor.asking.{key}={_written(asking[key])}" for key in ASKED if key in asking)


def _written(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, str):
        return '"' + re.sub(r'(\\*)("|\Z)', lambda m: 2 * m[1] + m[2].replace('"', '\\"'), value) + '"'
    if isinstance(value, Sequence):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _untouched(suite: Suite, task: TaskEntry, method: str) -> tuple[str, ...]:
    costs = (f"evaluator.budget.{suite.unit}={suite.budgets[task.name]!r}",) if method in AT_EQUAL_COST else ()
    return ("strategy=untouched", f"evaluator.method={method}", *costs)


def _arm(suite: Suite, task: TaskEntry, name: str, kind: str, overrides: Sequence[str], of: tuple[str, ...]) -> Arm:
    row = Arm(name, task.name, kind, of)
    for seed in suite.seeds:
        words = _overrides(suite, task, overrides, seed, trained=kind not in UNTRAINED)
        composed = _composed(suite, task, name, words, admit=not row.cells)
        row.configuration = row.configuration or composed.recorded
        row.tasks[seed] = composed.values["task"]
        row.cells.append(Cell(name, task.name, seed, tuple(words), cell_key(composed)))
    return row


def cell_key(composed: Config) -> str:
    """The digest of a configuration, its folder aside."""
    return digest({k: v for k, v in composed.recorded.items() if k != "run"})[:16]


def _overrides(suite: Suite, task: TaskEntry, arm: Sequence[str], seed: int, trained: bool) -> list[str]:
    """The overrides of a cell; of equal keys the last counts."""
    words = [w.replace("{seed}", str(seed)) for w in (*suite.base, *task.overrides, *arm)]
    keyed = {o.get_key_element().lstrip("+"): str(o.input_line) for o in configuration.parse(words)}
    guards = ["rounds"]
    if trained:  # the budget stops an arm and nothing else does, unless the arm names guards of its own
        [own] = [o.value() for o in configuration.parse([keyed["guard"]])] if "guard" in keyed else [[]]
        guards = [str(g) for g in dict.fromkeys((*(own if isinstance(own, list) else [own]), "budget", "rounds"))]
        keyed[f"guard.budget.{suite.unit}"] = f"guard.budget.{suite.unit}={suite.budgets[task.name]!r}"
    keyed["guard"] = f"guard=[{','.join(guards)}]"
    keyed.setdefault("guard.rounds.rounds", f"guard.rounds.rounds={suite.rounds if trained else 1}")
    keyed.setdefault("observer", "observer=[]")
    keyed["seed"] = f"seed={seed}"
    return list(keyed.values())


def _composed(suite: Suite, task: TaskEntry, arm: str, words: Sequence[str], admit: bool = False) -> Config:
    try:
        composed = configuration.anchored(configuration.compose(words))
        configuration.check(composed)
        if admit:
            configuration.admit(composed)
    except ConfigError as e:
        raise ConfigError(f"suite {suite.name}, arm {arm} on task {task.name}: {e}") from e
    return composed


def _check_same(suite: Suite, rows: Sequence[Arm]) -> None:
    """Refuse arms of one task that would be measured on different questions, or differently. Raises: ConfigError."""
    for row in rows[1:]:
        for group in SAME:
            if different := _differences(flat(rows[0].configuration[group], group), flat(row.configuration[group], group)):
                raise ConfigError(
                    f"suite {suite.name}, task {row.task}: the arms {rows[0].name} and {row.name} differ in {', '.join(different)}, so they "
                    f"cannot be compared; say it once, in tasks.{row.task}.overrides, or with base=[{group}=NAME] on the command line"
                )


def _merged(suite: Suite, rows: Sequence[Arm]) -> list[Arm]:
    """The rows with equal cells once: a null arm that several strategies share, or that is a strategy of the suite, is that of all of them.

    Raises: ConfigError, where two strategies are the same.
    """
    found: dict[tuple[str, ...], Arm] = {}
    for row in rows:
        known = found.setdefault(tuple(c.key for c in row.cells), row)
        if known is row:
            continue
        if row.kind == "strategy":
            raise ConfigError(
                f"suite {suite.name}, task {row.task}: the arms {known.name} and {row.name} have one configuration, so there is nothing to compare; "
                "take one of them out, or change what it overrides"
            )
        known.of = tuple(dict.fromkeys((*known.of, *row.of)))
    return list(found.values())


def _name(arms: Sequence[Arm]) -> None:
    """Name null arms of one kind after their strategies, where a suite has several that differ in these."""
    for kind in NULLS:
        rows = [a for a in arms if a.kind == kind]
        if len({a.of for a in rows}) > 1:
            for row in rows:
                row.name = f"{kind} ({', '.join(row.of)})"
                row.cells = [dataclasses.replace(c, arm=row.name) for c in row.cells]


def _described(row: Arm) -> dict[str, Any]:
    return {k: v for k, v in flat(row.configuration).items() if not k.startswith("choices")}


def _differences(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {k: own.get(k) for k in sorted({*base, *own}) if base.get(k) != own.get(k)}
