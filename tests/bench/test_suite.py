from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.bench.suite import Suite, checked, known, suite_of
from selfimprove.errors import ConfigError

GOOD: dict[str, Any] = {"tasks": ["toy"], "arms": ["toy"], "seeds": 2, "budget": {"flops": "1e9"}}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_subnormal=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_a_suite_without_a_file() -> None:
    made = suite_of(["arms=[seal,srt]", "task=arithmetic", "seeds=5", "budget.flops=1e16"])
    assert [a.overrides for a in made.arms] == [("strategy=seal",), ("strategy=srt",)]
    assert [t.overrides for t in made.tasks] == [("task=arithmetic",)]
    assert (made.seeds, made.unit, made.budgets) == ((0, 1, 2, 3, 4), "flops", {"arithmetic": 1e16})


def test_words_replace_what_a_file_says(tmp_path: Path) -> None:
    made = suite_of(["suite=smoke", "seeds=[7]", "nulls=[greedy]"])
    assert (made.name, made.seeds, made.nulls) == ("smoke", (7,), ("greedy",))
    path = tmp_path / "mine.yaml"
    path.write_text("tasks: [toy]\narms: [toy]\nbudget: {labels: 3}\n")
    assert suite_of([f"suite={path}"]).unit == "labels"


def test_a_task_may_have_a_budget_of_its_own(tmp_path: Path) -> None:
    own = {"overrides": ["task=toy"], "budget": {"flops": "5e8"}}
    assert checked("x", {**GOOD, "tasks": {"one": ["task=toy"], "two": own}}).budgets == {"one": 1e9, "two": 5e8}
    assert checked("x", {**GOOD, "tasks": {"two": own}, "budget": None}).budgets == {"two": 5e8}
    path = tmp_path / "mine.yaml"
    path.write_text("tasks: {one: [task=toy], two: {overrides: [task=toy], budget: {flops: 3}}}\narms: [toy]\nbudget: {flops: 2}\n")
    assert suite_of([f"suite={path}"]).budgets == {"one": 2, "two": 3}
    assert suite_of([f"suite={path}", "budget.labels=7"]).budgets == {"one": 7, "two": 7}, "said on the command line, it is every task's"
    with pytest.raises(ConfigError, match="budgets want one unit"):
        checked("x", {**GOOD, "tasks": {"one": ["task=toy"], "two": {**own, "budget": {"labels": 3}}}})
    with pytest.raises(ConfigError, match=r"tasks\.two: budget wants one amount"):
        checked("x", {**GOOD, "tasks": {"two": {**own, "budget": {"flop": 3}}}})


@pytest.mark.parametrize(
    "path", [p for _, p in known() if p.is_absolute()] + sorted(Path(__file__).parents[2].glob("benchmarks/suites/*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_suite_is_one(path: Path) -> None:
    assert isinstance(suite_of([f"suite={path}"]), Suite)


def test_a_plugin_brings_suites_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine-1.dist-info").mkdir()
    (tmp_path / "mine-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (tmp_path / "mine-1.dist-info" / "entry_points.txt").write_text("[selfimprove.suites]\nmine = mine_suites\n")
    (tmp_path / "mine_suites").mkdir()
    (tmp_path / "mine_suites" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "mine_suites" / "brought.yaml").write_text("tasks: [toy]\narms: [toy]\nbudget: {labels: 3}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert suite_of(["suite=brought"]).name == "brought"
    (tmp_path / "mine_suites" / "smoke.yaml").write_text("tasks: [toy]\narms: [toy]\nbudget: {labels: 3}\n")
    with pytest.raises(ConfigError, match=r"several suites 'smoke': .*suites/smoke.yaml and .*mine_suites/smoke.yaml; name the file"):
        suite_of(["suite=smoke"])


def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("about: 2020-13-45\n")
    with pytest.raises(ConfigError, match=r"odd.yaml cannot be read"):
        suite_of([f"suite={tmp_path / 'odd.yaml'}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=smok"], "did you mean smoke"),
        (["suite=nowhere.yaml"], "cannot be read"),
        (["seeds"], "key=value"),
        (["seeds=[1"], "no YAML"),
        ([], "name a suite"),
        (["arms=[a]"], "name a suite"),
        (["suite=smoke", "seeds=0"], "seeds wants"),
        (["suite=smoke", "budget.flop=3"], "budget wants one amount"),
        (["suite=smoke", "budget.flops=-1"], "a number from 0"),
        (["suite=smoke", "nulls=[greed]"], "did you mean greedy"),
        (["suite=smoke", "sedes=3"], "did you mean seeds"),
        (["suite=smoke", "arms={greedy: []}"], "name of a null arm"),
        (["suite=smoke", "arms={a: {tasks: [toyy]}}"], "did you mean toy"),
        (["suite=smoke", "arms={a/b: []}"], "no name"),
        (["suite=smoke", 'arms={"a\\nb": []}'], "no name"),
        (["suite=smoke", "about=2020-13-45"], "the value is no YAML"),
        (["suite=smoke", "about=2020-12-24"], "about wants a text"),
        (["suite=smoke", "budget.flops=1", "budget.labels=3"], "'budget.labels=3' is a second budget"),
        (["suite=smoke", "effect=1" + 400 * "0"], "wants a number"),
    ],
)
def test_a_mistake_is_answered_with_what_was_wanted(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(words)


@given(st.sampled_from(["tasks", "arms", "seeds", "budget", "nulls", "base", "effect", "tolerance", "rounds", "about"]), json_values)
def test_any_value_makes_a_suite_or_a_clear_error(key: str, value: Any) -> None:
    try:
        assert isinstance(checked("x", {**GOOD, key: value}), Suite)
    except ConfigError as e:
        assert "suite x" in str(e)
