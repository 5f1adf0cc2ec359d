"""A suite: which arms are compared, on which tasks, with which seeds, at which budget. A YAML file, or words of the command line."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from selfimprove.discovery import find_spec, nearest
from selfimprove.errors import ConfigError
from selfimprove.ledger import UNITS

ENTRY_POINTS = "selfimprove.suites"
"""The entry-point group in which a plugin names its package of suites."""
UNTRAINED = ("greedy", "best_temperature", "majority", "best_of_n")
"""Null arms of a task: the untouched model, decoded in these ways."""
AT_EQUAL_COST = ("majority", "best_of_n")
"""Untrained null arms that take as many samples as the budget pays for."""
NULLS = (*UNTRAINED, "random_reward", "random_edits", "supervised")
"""All null arms. Random reward and random edits are made of every arm, the others of every task."""


@dataclass(frozen=True)
class TaskEntry:
    """A task of a suite. ``{seed}`` in an override is the cell's seed."""

    name: str
    overrides: tuple[str, ...]
    untouched: tuple[str, ...] = ()
    """More overrides for the arms of the untouched model, such as how it is asked."""
    supervised: tuple[str, ...] | None = ()
    """More overrides for the supervised arm; None leaves it out."""
    budget: Mapping[str, float] = field(default_factory=dict)
    """What every trained arm spends on this task, where that is not the suite's budget."""


@dataclass(frozen=True)
class ArmEntry:
    """An arm of a suite, as overrides of the configuration."""

    name: str
    overrides: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    """The tasks that it runs on; empty is all of them."""
    random_reward: tuple[str, ...] | None = None
    """What makes its reward random; None exchanges the rewards of a round among its trials, which costs what they cost and suits every updater."""


@dataclass(frozen=True)
class Suite:
    """What a benchmark compares, and at which cost."""

    name: str
    tasks: tuple[TaskEntry, ...]
    arms: tuple[ArmEntry, ...]
    seeds: tuple[int, ...]
    unit: str
    """The unit of the ledger that the budgets are in: one, because a report has one axis of cost."""
    budgets: Mapping[str, float]
    """What every trained arm spends on a task, by task."""
    about: str = ""
    base: tuple[str, ...] = ()
    """Overrides of every cell."""
    nulls: tuple[str, ...] = NULLS
    effect: float = 0.05
    """The smallest difference that matters: what power is told for."""
    tolerance: float = 0.1
    """How much of the smaller one two arms' spending may differ before their comparison is invalid."""
    rounds: int = 1000
    """Rounds at most: ends an arm that spends nothing of the budget's unit."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """As it was given."""


def suite_of(words: Sequence[str]) -> Suite:
    """The suite that these words ask for: ``suite=NAME``, or ``arms=[a,b] task=NAME``; other keys replace what its file says.

    ``budget.UNIT=AMOUNT`` is that of every task, also of those that the file gives a budget of their own.

    Raises: ConfigError.
    """
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value; write suite=NAME, arms=[a,b], task=NAME, seeds=5, budget.flops=1e15 …")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as e:  # a date that is none is a ValueError
            raise ConfigError(f"{word!r}: the value is no YAML ({str(e).splitlines()[0]}); quote it") from e
        if key.startswith("budget."):
            if "budget" in given:
                raise ConfigError(f"{word!r} is a second budget; a report has one axis of cost, so give one budget.UNIT=AMOUNT")
            given["budget"] = {key.removeprefix("budget."): value}
        else:
            given[key] = value
    name = given.pop("suite", None)
    if name is None:
        if "arms" not in given or not {"task", "tasks"} & set(given):
            raise ConfigError(
                f"name a suite (`suite=NAME`; there are {', '.join(sorted(dict(known()))) or 'none'}), or give arms=[a,b] and task=NAME"
            )
        name = "custom"
        written: dict[str, Any] = {}
    else:
        name, written = _read(str(name))
    if "task" in given:
        given["tasks"] = [given.pop("task")]
    if "budget" in given and isinstance(tasks := written.get("tasks"), Mapping):
        written["tasks"] = {n: {k: v for k, v in t.items() if k != "budget"} if isinstance(t, Mapping) else t for n, t in tasks.items()}
    return checked(str(name), {**written, **given})


def known() -> Iterator[tuple[str, Path]]:
    """(name, file) of every suite: of this folder's ``benchmarks/suites``, of plugins, and the package's own."""
    folders = [Path("benchmarks", "suites"), Path(__file__).parent / "suites"]
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        spec = find_spec(point.value)
        folders += [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            yield path.stem, path


def checked(name: str, values: Mapping[str, Any]) -> Suite:
    """The suite that these values describe. Raises: ConfigError, naming the key."""
    takes = ("about", "base", "tasks", "arms", "seeds", "budget", "nulls", "effect", "tolerance", "rounds")
    if strange := [k for k in values if k not in takes]:
        raise ConfigError(f"suite {name}: there is no {strange[0]!r}{nearest(str(strange[0]), takes)} (a suite has {', '.join(takes)})")
    tasks = tuple(_task(name, n, v) for n, v in _entries(name, "tasks", values, "task").items())
    names = [t.name for t in tasks]
    arms = tuple(_arm(name, n, v, names) for n, v in _entries(name, "arms", values, "strategy").items())
    if same := [a.name for a in arms if a.name in NULLS]:
        raise ConfigError(f"suite {name}: {same[0]!r} is the name of a null arm; call that arm something else")
    nulls = tuple(NULLS if values.get("nulls", "auto") == "auto" else _texts(f"suite {name}: nulls", values["nulls"]))
    if strange := [n for n in nulls if n not in NULLS]:
        raise ConfigError(f"suite {name}: there is no null arm {strange[0]!r}{nearest(strange[0], NULLS)} (there are {', '.join(NULLS)})")
    unit, budgets = _budgets(name, tasks, values.get("budget"))
    return Suite(
        name=name,
        tasks=tasks,
        arms=arms,
        seeds=_seeds(name, values.get("seeds", 5)),
        unit=unit,
        budgets=budgets,
        about=_text(f"suite {name}: about", values.get("about", "")),
        base=_texts(f"suite {name}: base", values.get("base", [])),
        nulls=nulls,
        effect=_number(f"suite {name}: effect", values.get("effect", Suite.effect)),
        tolerance=_number(f"suite {name}: tolerance", values.get("tolerance", Suite.tolerance)),
        rounds=int(_number(f"suite {name}: rounds", values.get("rounds", Suite.rounds))),
        written=dict(values),
    )


def _read(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else _named(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"suite {path} cannot be read ({str(e).splitlines()[0]}); name a YAML file that describes a suite") from e
    if not isinstance(values, dict):
        raise ConfigError(f"suite {path} holds no mapping; it wants arms, tasks, seeds and a budget")
    return path.stem, values


def _named(name: str) -> Path:
    """The file of the one suite that has this name. Raises: ConfigError."""
    found: dict[str, list[Path]] = {}
    for stem, path in known():
        found.setdefault(stem, []).append(path)
    if name not in found:
        raise ConfigError(f"there is no suite {name!r}{nearest(name, found)} (there are {', '.join(sorted(found))}; suite=FILE.yaml takes any file)")
    files = list({p.resolve(): p for p in found[name]}.values())
    if len(files) > 1:
        raise ConfigError(f"there are several suites {name!r}: {' and '.join(map(str, files))}; name the file of the one you mean, suite=FILE.yaml")
    return files[0]


def _entries(suite: str, key: str, values: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The entries of a suite's arms or tasks by name. A list names options: ``[seal]`` is ``{seal: [strategy=seal]}``."""
    found = values.get(key)
    if isinstance(found, (list, tuple)) and all(isinstance(n, str) for n in found):
        found = {n: [f"{group}={n}"] for n in found}
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"suite {suite} wants {key}: a list of names, or a mapping of names to overrides; got {found!r}")
    for name in found:
        if not isinstance(name, str) or not name.strip() or "/" in name or not name.isprintable():
            raise ConfigError(f"suite {suite}: {name!r} is no name for one of its {key}; use words without a slash and control characters")
    return dict(found)


def _task(suite: str, name: str, value: Any) -> TaskEntry:
    at = f"suite {suite}: tasks.{name}"
    fields = _fields(at, value, ("overrides", "untouched", "supervised", "budget"))
    supervised = fields.get("supervised", [])
    return TaskEntry(
        name,
        _texts(f"{at}.overrides", fields.get("overrides", [])),
        _texts(f"{at}.untouched", fields.get("untouched", [])),
        None if supervised is False else _texts(f"{at}.supervised", supervised),
        _budget(at, fields["budget"]) if "budget" in fields else {},
    )


def _arm(suite: str, name: str, value: Any, tasks: Sequence[str]) -> ArmEntry:
    at = f"suite {suite}: arms.{name}"
    fields = _fields(at, value, ("overrides", "tasks", "random_reward"))
    chosen = _texts(f"{at}.tasks", fields.get("tasks", []))
    if strange := [t for t in chosen if t not in tasks]:
        raise ConfigError(f"{at}.tasks: there is no task {strange[0]!r}{nearest(strange[0], tasks)} in this suite")
    random = _texts(f"{at}.random_reward", fields["random_reward"]) if "random_reward" in fields else None
    return ArmEntry(name, _texts(f"{at}.overrides", fields.get("overrides", [])), chosen, random)


def _fields(at: str, value: Any, takes: Sequence[str]) -> dict[str, Any]:
    if isinstance(value, (list, tuple)):
        return {"overrides": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{at} wants a list of overrides, or a mapping with {', '.join(takes)}; got {value!r}")
    if strange := [k for k in value if k not in takes]:
        raise ConfigError(f"{at}: there is no {strange[0]!r}{nearest(str(strange[0]), takes)} (it takes {', '.join(takes)})")
    return dict(value)


def _text(at: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{at} wants a text; got {value!r}, so put it into quotes")
    return value


def _texts(at: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{at} wants a list of texts; got {value!r}")
    return tuple(value)


def _seeds(suite: str, value: Any) -> tuple[int, ...]:
    seeds = range(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(seeds, (list, tuple, range)) and seeds and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds):
        return tuple(dict.fromkeys(seeds))
    raise ConfigError(f"suite {suite}: seeds wants a number of seeds, or a list of them; got {value!r}")


def _budgets(suite: str, tasks: Sequence[TaskEntry], value: Any) -> tuple[str, dict[str, float]]:
    """The unit of a suite, and the amount of every task: its own budget, or the suite's."""
    own = {t.name: t.budget for t in tasks}
    if value is not None or not all(own.values()):
        whole = _budget(f"suite {suite}", value)
        own = {name: budget or whole for name, budget in own.items()}
    units = {name: next(iter(budget)) for name, budget in own.items()}
    if len(set(units.values())) > 1:
        raise ConfigError(f"suite {suite}: budgets want one unit, since a report has one axis of cost; got {units}")
    return next(iter(units.values())), {name: next(iter(budget.values())) for name, budget in own.items()}


def _budget(at: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in UNITS:
        raise ConfigError(f"{at}: budget wants one amount, such as budget.flops=1e15 (units: {', '.join(UNITS)}); got {value!r}")
    [(unit, amount)] = value.items()
    found = _number(f"{at}: budget.{unit}", amount)
    if found <= 0:
        raise ConfigError(f"{at}: budget.{unit} wants more than 0; got {amount!r}")
    return {unit: found}


def _number(at: str, value: Any) -> float:
    try:
        found = float(value)  # YAML reads 1e15 as a text
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"{at} wants a number; got {value!r}") from e
    if isinstance(value, bool) or not 0 <= found < float("inf"):
        raise ConfigError(f"{at} wants a number from 0; got {value!r}")
    return found
