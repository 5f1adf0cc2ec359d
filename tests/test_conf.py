"""The shipped options: every one composes, names a class that exists, and gives exactly its arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import yaml

from selfimprove import config, discovery
from selfimprove.discovery import Option

SOURCES = discovery.sources()
OPTIONS = [o for s in SOURCES for o in s.options()]
STRATEGIES = sorted(o.name for o in OPTIONS if o.group == "strategy")
GIVEN = {
    "engine=openai": ["engine.base_url=http://localhost/v1"],
    "engine=openai_lora": ["engine.base_url=http://localhost/v1", "engine.adapters=x"],
    "grader=judge": ["grader.base_url=http://localhost/v1", "grader.model=m"],
    "guard=[budget]": ["guard.budget.labels=1"],
    "model=hf": ["model.name=a/b"],
    "task=reasoning": ["task.family=gcd"],
    "task=squad": ["task.path=x.json"],
}
"""What an option has to be told."""


def override(option: Option) -> list[str]:
    first = f"{option.group}=[{option.name}]" if option.group in config.SEVERAL else f"{option.group}={option.name}"
    return [first, *GIVEN.get(first, [])]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.group}-{o.name}")
def test_every_option_gives_exactly_the_arguments_of_its_class(option: Option) -> None:
    assert option.broken() is None
    for at, node in discovery.nodes(yaml.safe_load(option.text)):
        cls = config.located(node["_target_"], at, SOURCES)
        parameters = inspect.signature(cls).parameters.values()
        named = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        given = {k for k in node if not k.startswith("_")}
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            assert named <= given
        else:
            assert given == named, f"{option.path.name}: {at or 'the node'} gives {sorted(given)}, {cls.__name__} takes {sorted(named)}"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.group}-{o.name}")
def test_every_option_says_what_it_is(option: Option) -> None:
    assert option.summary
    assert "/" not in option.group, "nested groups are missed by glob(*); keep names flat"
    assert option.group in config.GROUPS


TASKS, ENGINES = ([o for o in OPTIONS if o.group == g] for g in ("task", "engine"))


def composed(strategy: str, row: Sequence[Option]) -> None:
    chosen = config.compose([f"strategy={strategy}", *(text for option in row for text in override(option))])
    for option in row:
        taken = chosen.choices[option.group]
        assert option.name in (taken if option.group in config.SEVERAL else [taken])
    config.check(chosen)


def rows() -> list[list[Option]]:
    """One option of every group at a time, in as many rows as the largest group has options."""
    groups = [[[o] for o in OPTIONS if o.group == g] for g in config.GROUPS if g not in ("strategy", "task", "engine")]
    real = [e for e in ENGINES if e.name != "toy"]
    pairs = [[t, real[i % len(real)]] for i, t in enumerate(TASKS)] + [[t, e] for t in TASKS for e in ENGINES if t.name == e.name == "toy"]
    columns = [c for c in [*groups, pairs] if c]
    assert {o for c in columns for row in c for o in row} == {o for o in OPTIONS if o.group != "strategy"}
    return [[option for column in columns for option in column[i % len(column)]] for i in range(max(map(len, columns)))]


def test_every_strategy_and_every_option_composes() -> None:
    found = rows()
    for i in range(max(len(STRATEGIES), len(found))):
        composed(STRATEGIES[i % len(STRATEGIES)], found[i % len(found)])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_composes_with_every_option_of_every_group(strategy: str) -> None:
    for row in rows():
        composed(strategy, row)


def test_every_task_composes_with_every_engine() -> None:
    for task, engine in itertools.product(TASKS, ENGINES):
        if engine.name != "toy" or task.name == "toy":  # the toy engine reads the toy task's size
            composed("toy", [task, engine])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_only_chooses_options(strategy: str) -> None:
    [option] = [o for o in OPTIONS if (o.group, o.name) == ("strategy", strategy)]
    written: dict[str, Any] = yaml.safe_load(option.text)
    assert set(written) == {"defaults"}
    for line in written["defaults"]:
        [(key, value)] = line.items()
        assert key.startswith("override /")
        assert isinstance(value, (str, list))


def test_every_group_can_be_chosen_on_the_command_line() -> None:
    [core] = [s for s in SOURCES if s.distribution == discovery.CORE]
    assert core.folder is not None
    defaults = yaml.safe_load((core.folder / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    named = [next(iter(d)) for d in defaults if isinstance(d, dict)]
    assert sorted(named) == sorted(config.GROUPS)
    assert defaults.index("_self_") == len(defaults) - 2, "roles, then this file, then the strategy"
    assert named[-1] == "strategy"


def test_no_two_options_have_one_name() -> None:
    discovery.check_unique(OPTIONS)
