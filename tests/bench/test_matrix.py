from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hydra.core.override_parser.types import QuotedString
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import config, discovery
from selfimprove.bench.drawing import undrawable
from selfimprove.bench.matrix import Arm, Matrix, _written, matrix
from selfimprove.bench.suite import NULLS, checked, suite_of
from selfimprove.cli import main
from selfimprove.errors import ConfigError

TOY = ["task=toy", "engine=toy"]


def made(**values: object) -> Matrix:
    return matrix(checked("x", {"tasks": {"toy": TOY}, "arms": ["toy"], "seeds": [0], "budget": {"flops": 1e9}, **values}))


def named(found: Matrix, name: str) -> Arm:
    [arm] = [a for a in found.arms if a.name == name]
    return arm


def test_every_null_arm_stands_beside_a_strategy() -> None:
    found = matrix(suite_of(["suite=smoke", "seeds=2"]))
    assert [a.kind for a in found.arms] == ["strategy", "random_reward", "random_edits", *(n for n in NULLS if not n.startswith("random"))]
    assert not found.left_out
    assert len({c.key for c in found.cells}) == 2 * len(found.arms)
    assert [c.seed for c in found.cells] == sorted(c.seed for c in found.cells), "a benchmark that is stopped early has whole seeds"


def test_the_budget_stops_trained_arms_and_one_round_untrained_ones() -> None:
    found = made(nulls=["greedy", "majority"])
    assert {"guard=[budget,rounds]", "guard.budget.flops=1000000000.0"} <= set(named(found, "toy").cells[0].overrides)
    assert {"guard=[rounds]", "guard.rounds.rounds=1"} <= set(named(found, "greedy").cells[0].overrides)
    assert "evaluator.budget.flops=1000000000.0" in named(found, "majority").cells[0].overrides


def test_guards_that_an_arm_names_stay() -> None:
    found = made(arms={"toy": ["strategy=toy", "guard=[plateau]"]}, nulls=[])
    assert "guard=[plateau,budget,rounds]" in named(found, "toy").cells[0].overrides


def test_equal_null_arms_of_two_strategies_are_run_once() -> None:
    arms = {
        n: {"overrides": ["strategy=toy", *more], "random_reward": ["rewarder=chance"]} for n, more in {"a": [], "b": ["rewarder=accept"]}.items()
    }
    found = made(arms=arms, nulls=["random_reward"])
    [null] = [a for a in found.arms if a.kind == "random_reward"]
    assert null.of == ("a", "b")
    assert named(found, "b").differs["rewarder.probability"] == 1.0


def test_two_names_for_one_arm_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the arms a and b have one configuration"):
        made(arms={"a": ["strategy=toy"], "b": ["strategy=toy"]}, nulls=[])


def test_a_strategy_that_is_the_null_arm_of_another_is_both() -> None:
    chance = ["strategy=toy", "middleware=[shuffled_rewards]"]
    found = made(arms={"chance": {"overrides": chance, "random_reward": ["rewarder=chance"]}, "a": ["strategy=toy"]}, nulls=["random_reward"])
    assert [(a.name, a.kind, a.of) for a in found.arms] == [
        ("chance", "strategy", ("a",)),
        ("a", "strategy", ()),
        ("random_reward", "random_reward", ("chance",)),
    ]


def test_a_task_that_no_text_answers_has_no_null_arms_in_words() -> None:
    repair = ["task=program_repair", "task.train=2", "task.validation=2", "task.test=2"]
    found = made(tasks={"repair": repair}, arms={"hgm": ["strategy=hgm", "editor=grammar_uniform", "engine=scripted"]})
    assert [a.name for a in found.arms] == ["hgm", "random_reward"]
    assert "no text can answer" in found.left_out["repair/greedy, best_temperature, majority, best_of_n, supervised"]


def test_null_arms_of_strategies_that_differ_are_named_after_them() -> None:
    found = made(arms={"a": ["strategy=toy"], "b": ["strategy=toy", "editor.edits=3"]}, nulls=["random_reward"])
    assert [a.name for a in found.arms if a.kind == "random_reward"] == ["random_reward (a)", "random_reward (b)"]


def test_null_arms_of_different_tasks_are_told_apart_too() -> None:
    tasks = {"one": TOY, "two": {"overrides": [*TOY, "task.people=3"], "budget": {"flops": 2e9}}}
    arms = {"a": {"overrides": ["strategy=toy"], "tasks": ["one"]}, "b": {"overrides": ["strategy=toy"], "tasks": ["two"]}}
    found = made(tasks=tasks, arms=arms, nulls=["random_edits", "majority"])
    assert [(a.task, a.name) for a in found.arms if a.kind == "random_edits"] == [("one", "random_edits (a)"), ("two", "random_edits (b)")]
    assert {c.arm for a in found.arms for c in a.cells} == {a.name for a in found.arms}
    assert [a.name for a in found.arms if a.kind == "majority"] == ["majority", "majority"]
    spends = {c.task: {w for w in c.overrides if w.startswith("guard.budget")} for a in found.arms if a.kind == "strategy" for c in a.cells}
    assert spends == {"one": {"guard.budget.flops=1000000000.0"}, "two": {"guard.budget.flops=2000000000.0"}}
    assert [w for w in named(found, "b").cells[0].overrides if "evaluator.budget" in w] == []
    assert [w for a in found.arms for w in a.cells[0].overrides if "evaluator.budget" in w] == [
        "evaluator.budget.flops=1000000000.0",
        "evaluator.budget.flops=2000000000.0",
    ]


def test_keys_go_by_the_configuration_alone() -> None:
    one, other = made(nulls=[]), made(nulls=[], arms={"renamed": ["strategy=toy"]})
    assert one.cells[0].key == other.cells[0].key
    assert one.cells[0].key != made(nulls=[], budget={"flops": 2e9}).cells[0].key


def test_null_arms_are_graded_as_the_strategy_is_and_arms_that_differ_there_are_refused() -> None:
    found = made(arms={"toy": ["strategy=toy", "grader=exact"]}, nulls=["greedy"])
    assert "grader=exact" in named(found, "greedy").cells[0].overrides
    with pytest.raises(ConfigError, match=r"a and b differ in grader._target_.*say it once, in tasks.toy.overrides"):
        made(arms={"a": ["strategy=toy"], "b": ["strategy=toy", "grader=f1"]}, nulls=[])


def test_a_random_reward_keeps_the_rewarder_and_its_cost() -> None:
    found = made(arms={"toy": ["strategy=toy", "middleware=[truth]"]}, nulls=["random_reward"])
    assert "middleware=[truth,shuffled_rewards]" in named(found, "random_reward").cells[0].overrides
    assert {k.split(".")[0] for k in named(found, "random_reward").differs} == {"middleware"}


def test_strategies_of_several_families_are_compared_without_a_file() -> None:
    """What one family says of the grader holds for those that say nothing, and the untouched model is asked as the first that says how."""
    found = matrix(suite_of(["arms=[seal,srt,eggroll]", "task=arithmetic", "seeds=1", "budget.flops=1e16"]))
    assert {a.configuration["choices"]["grader"] for a in found.arms} == {"math"}
    assert {a.kind for a in found.arms} == {"strategy", *NULLS}
    for name in ("greedy", "supervised"):
        asked = named(found, name).configuration["editor"]["asking"]
        assert {k: v for k, v in named(found, "srt").configuration["editor"]["asking"].items() if asked[k] != v} == {}


@given(st.text() | st.lists(st.text(alphabet="a\\\"', []{}=")) | st.booleans() | st.integers() | st.none())
def test_values_survive_being_written_as_overrides(value: object) -> None:
    def plain(read: object) -> object:
        return read.text if isinstance(read, QuotedString) else [plain(r) for r in read] if isinstance(read, list) else read

    [read] = config.parse([f"key={_written(value)}"])
    assert plain(read.value()) == value


def test_an_arm_that_cannot_work_is_named_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"arm toyy on task toy: .*did you mean toy"):
        made(arms=["toyy"], nulls=[])


def test_an_arm_whose_roles_do_not_go_together_is_named_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"arm toy on task toy: Best \(selector\) needs scores"):
        made(arms={"toy": ["strategy=toy", "selector=best", "evaluator=none"]}, nulls=[])


def test_suite_small_composes_with_what_is_installed() -> None:
    whole = suite_of([f"suite={Path(__file__).parents[2] / 'benchmarks' / 'suites' / 'small.yaml'}", "seeds=1"])
    strategies = {o.name for s in discovery.sources() for o in s.options() if o.group == "strategy"}
    here = [a for a in whole.arms if any(f"strategy={s}" in a.overrides for s in strategies)]
    assert {"srt", "policy_gradient", "seal"} <= {a.name for a in here}
    found = matrix(dataclasses.replace(whole, arms=tuple(here)))
    srt, pg = (named(found, n) for n in ("srt", "policy_gradient"))
    assert {k for k in pg.differs if not k.startswith("rewarder.")} == set(), "they differ in the reward alone"
    assert any(a.kind == "random_reward" and set(a.of) == {"srt", "policy_gradient"} for a in found.arms), "one null arm for both"
    assert srt.task == "arithmetic"


def test_a_split_that_cannot_be_drawn_is_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "task.train=8,task.validation=4,task.test=40"
    words = ["arms=[srt]", "task=arithmetic", "budget.flops=1e12", "seeds=[3]", "nulls=[greedy]"]
    words.append(f"base=['task.levels=[{{min_digits:1,max_digits:1}}]',{sizes}]")
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    assert "suite custom, task arithmetic, seed 3: task.family=products has only 38 different questions for test" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_that_seeds_have_in_common_are_drawn_once() -> None:
    words = ["arms=[toy]", "task=toy", "budget.flops=1e9", "seeds=3"]
    assert list(matrix(suite_of(words)).tasks) == ["task toy, seed 0"]
    assert undrawable(matrix(suite_of(words)).tasks) is None
