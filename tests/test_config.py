"""Composition, argument checks, and what a run folder's configuration may name."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from selfimprove import config, discovery
from selfimprove.config import Config
from selfimprove.errors import ConfigError

TOY = "strategy=toy"
TEXT = st.text(alphabet=st.sampled_from("ab\\${}[]:,. '\"\n#-é"), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


def test_the_command_line_wins_over_the_strategy() -> None:
    composed = config.compose([TOY, "selector=gate", "selector.tolerance=0.25", "seed=3"])
    assert composed.choices["selector"] == "gate"
    assert composed.values["selector"]["tolerance"] == 0.25
    assert (composed.strategy, composed.seed) == ("toy", 3)


def test_several_guards_keep_their_names_and_non_finite_stays() -> None:
    composed = config.compose([TOY, "guard=[budget,rounds]", "guard.budget.labels=5"])
    assert set(composed.values["guard"]) == {"budget", "rounds", "non_finite"}
    assert composed.choices["guard"] == list(composed.values["guard"])
    assert "non_finite" not in config.compose([TOY, "~guard.non_finite"]).values["guard"]


def test_a_recorded_configuration_loads_as_itself(tmp_path: Path) -> None:
    composed = config.compose([TOY, "model=hf", "model.name=a/b", "observer=[]"])
    (tmp_path / "config.yaml").write_text(composed.text(), encoding="utf-8")
    assert config.load(tmp_path / "config.yaml") == composed


@settings(max_examples=50, deadline=None)
@given(value=VALUES)
def test_every_value_survives_the_run_folder(value: Any) -> None:
    text = OmegaConf.to_yaml(OmegaConf.create({"value": config._written(value)}))
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True) == {"value": value}


def test_the_environment_is_used_but_never_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOY_SECRET", "hunter2")
    composed = config.compose([TOY, "grader=judge", "grader.base_url=http://x/${oc.env:TOY_SECRET}", "grader.model=${grader.base_url}-m"])
    assert composed.values["grader"]["model"] == "http://x/hunter2-m"
    assert "hunter2" not in composed.text()
    (tmp_path / "config.yaml").write_text(composed.text(), encoding="utf-8")
    assert config.load(tmp_path / "config.yaml").values == composed.values


def test_what_reads_the_environment_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOY_SECRET", "hunter2")
    assert config.compose([TOY]).environment == []
    hidden = "grader.base_url='http://x/${oc.select:nowhere,${oc.env:TOY_SECRET}}'"
    for overrides, expected in (
        (["grader.base_url=http://x"], ["OPENAI_API_KEY"]),
        (["grader.base_url=http://x", "grader.api_key_env=null"], []),
        ([hidden, "grader.api_key_env=null"], ["TOY_SECRET"]),
    ):
        composed = config.compose([TOY, "grader=judge", "grader.model=m", *overrides])
        assert composed.environment == expected
        (tmp_path / "config.yaml").write_text(composed.text(), encoding="utf-8")
        assert config.load(tmp_path / "config.yaml").environment == expected


def test_relative_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOY_FOLDER", "there")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    (tmp_path / "data.json").write_text("[]")
    overrides = ["task=squad", "task.path=data.json", "engine=torch", "model=hf", "model.name=model", "observer=[tensorboard]"]
    composed = config.anchored(config.compose([TOY, *overrides, "observer.tensorboard.folder=${oc.env:TOY_FOLDER}"]))
    for values in (composed.values, composed.recorded):
        assert values["task"]["path"] == str(tmp_path / "data.json")
        assert values["model"]["name"] == values["engine"]["model"] == str(tmp_path / "model")
    assert composed.recorded["observer"]["tensorboard"]["folder"] == "${oc.env:TOY_FOLDER}"
    assert config.compose([TOY, "model=hf", "model.name=org/model"]).values["model"]["name"] == "org/model"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=tog"], "did you mean toy?"),
        (["stratgy=toy"], "did you mean strategy?"),
        ([TOY, "editor=contains"], "contains is an option of grader"),
        ([TOY, "editor.edit=3"], "did you mean edits?"),
        ([TOY, "guard.rounds.most=3"], "guard.rounds has rounds"),
        ([TOY, "+nothing.at.all=3"], "there is no 'nothing'"),
        ([TOY, "middleware=[mine]"], "installed: forgetting, shuffled_edits, shuffled_rewards, truth"),
        ([TOY, "seed=0,1"], "add -m"),
        ([TOY, "seed=much"], "seed wants a whole number"),
        ([TOY, "seed=-1"], "seed wants a whole number"),
        ([TOY, "seed=true"], "seed wants a whole number"),
        ([TOY, "seed"], "write key=value"),
        ([TOY, "model.name=~/x"], "quote the value"),
        ([TOY, "model=hf"], "add `model.name=VALUE`"),
        ([TOY, "editor=null"], "write ~editor"),
        ([TOY, "guard=null"], "write guard=[]"),
        ([TOY, "hydra.run.dir=x"], "see `run.folder=`"),
        ([TOY, "choices.strategy=seal"], "write strategy=NAME"),
        ([TOY, "+run.name=x"], "run wants a folder and nothing else"),
        ([TOY, "run.folder=3"], "run wants a folder"),
        ([TOY, "editor.edits=${nowhere}"], "editor.edits cannot be resolved"),
        ([TOY, "checkpoint=3"], "checkpoint wants"),
    ],
)
def test_a_mistake_gets_the_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.compose(overrides)
    assert message in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(override=st.one_of(TEXT, st.builds("{}={}".format, st.sampled_from([*config.GROUPS, "seed", "run.folder", "editor.edits", "a.b"]), TEXT)))
def test_no_override_makes_anything_but_a_configuration_or_an_explanation(override: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(config.compose([TOY, override]), Config)


# ---- arguments ----


class Takes:
    def __init__(self, count: int, rate: float = 0.5, names: Sequence[str] = (), mode: Literal["a", "b"] = "a", folder: str | None = None) -> None:
        self.given = (count, rate, names, mode, folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": "3"}, "x.count wants a whole number; got '3' (str)"),
        ({"count": True}, "x.count wants a whole number; got True (bool)"),
        ({"count": 3.0}, "x.count wants a whole number"),
        ({"count": 1, "rate": "fast"}, "x.rate wants a number"),
        ({"count": 1, "rate": float("nan")}, "x.rate wants a number"),
        ({"count": 1, "names": "ab"}, "x.names wants"),
        ({"count": 1, "names": ["a", 3]}, "x.names wants"),
        ({"count": 1, "mode": "c"}, "x.mode wants"),
        ({"count": 1, "folder": 3}, "x.folder wants text or null"),
        ({"count": 1, "nmaes": []}, "did you mean names?"),
        ({"count": "???"}, "x.count has to be given"),
        ({}, "x.count is missing"),
        ({"count": 1, "_partial_": True}, "x._partial_ is not taken"),
        ({"count": 1, "_args_": [1]}, "x._args_ is not taken"),
    ],
)
def test_an_argument_that_a_class_does_not_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_arguments("x", Takes, {"_target_": "tests.Takes", **given})
    assert message in str(caught.value)


def test_a_missing_value_is_named_where_another_refers_to_it() -> None:
    with pytest.raises(ConfigError, match=r"^model\.name has to be given: add `model\.name=VALUE`$"):
        config.compose(["strategy=toy", "engine=torch", "model=hf"])


def test_arguments_that_fit_pass() -> None:
    config.check_arguments("x", Takes, {"_target_": "t", "count": 1, "rate": 2, "names": ["a"], "mode": "b", "folder": None})


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (None, int | None, True),
        ([1, 2], list[int], True),
        ([1, "a"], tuple[int, ...], False),
        ([1, "a"], tuple[int, str], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        ({"_target_": "a.B"}, Sequence[str], True),
        ("x", Path, True),
        ("x", "unread", True),
        (object(), Any, True),
    ],
)
def test_fits(value: Any, annotation: Any, expected: bool) -> None:
    assert config.fits(value, annotation) is expected


# ---- what may be named ----


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "pathlib.Path",
        "selfimprove.storage.write_bytes",  # a function
        "selfimprove.storage.Path",  # a class of another library, within reach
        "selfimprove.runfolder.subprocess.Popen",
        "selfimprove.nowhere.Thing",
        "selfimprove.guards.Nothing",
        "selfimprove_but_not_really.X",
        "selfimprove",
        "",
        3,
    ],
)
def test_a_configuration_names_classes_of_installed_plugins_only(target: Any) -> None:
    with pytest.raises(ConfigError):
        config.instantiate({"_target_": target}, "editor", discovery.sources())


def test_a_nested_target_is_held_to_the_same_rule() -> None:
    node = {"_target_": "selfimprove.testing.ToyTask", "people": [{"_target_": "os.getcwd"}]}
    with pytest.raises(ConfigError, match=r"os\.getcwd"):
        config.instantiate(node, "task", discovery.sources())


def test_a_strangers_run_folder_executes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    text = config.compose([TOY]).text().replace("selfimprove.testing.ToyEditor\n  edits: 2", f"os.mkdir\n  path: {marker}")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"os\.mkdir"):
        config.build(config.load(tmp_path / "config.yaml"))
    assert not marker.exists()


def test_what_is_cheap_to_refuse_is_refused_before_a_model_opens() -> None:
    broken = config.compose([TOY, "engine=torch", "model=hf", "model.name=/nowhere/at/all", "evaluator=none", "selector=best"])
    with pytest.raises(ConfigError, match="needs scores"):
        config.build(broken)


# ---- multirun ----


def test_jobs_are_all_combinations_in_order() -> None:
    assert config.jobs([TOY, "seed=0,1", "editor.edits=range(1,3)"]) == [
        [TOY, "seed=0", "editor.edits=1"],
        [TOY, "seed=0", "editor.edits=2"],
        [TOY, "seed=1", "editor.edits=1"],
        [TOY, "seed=1", "editor.edits=2"],
    ]
    assert config.jobs([TOY, "~updater"]) == [[TOY, "~updater"]]
    with pytest.raises(ConfigError, match="key=a,b"):
        config.jobs(["seed=interval(0,1)"])
