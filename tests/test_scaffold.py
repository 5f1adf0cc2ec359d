"""`selfimprove new`: every combination of roles is a package that reads well; names that cannot work are refused."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from selfimprove import discovery
from selfimprove.cli import main
from selfimprove.errors import ConfigError
from selfimprove.hooks import API
from selfimprove.scaffold import KINDS, create
from selfimprove.testing import toy_session

EVERYTHING = sorted(KINDS)


@pytest.mark.parametrize("kinds", [("editor", "rewarder"), ("observer",), ("middleware", "selector"), tuple(KINDS)], ids=",".join)
def test_a_package_is_whole(kinds: tuple[str, ...], tmp_path: Path) -> None:
    folder = create("my_method", kinds, tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "my-method"
    assert project["entry-points"] == {"selfimprove.conf": {"my_method": "my_method.conf"}, "selfimprove.api": {"hooks": API}}
    conf = folder / "src" / "my_method" / "conf"
    groups = {p.parent.name for p in conf.rglob("*.yaml")}
    assert groups == {"strategy", *kinds}
    for path in conf.rglob("*.yaml"):
        option = discovery.Option(path.parent.name, path.stem, discovery.core(), path)
        assert option.summary
        for _, node in discovery.nodes(yaml.safe_load(option.text)):
            module, _, name = node["_target_"].rpartition(".")
            tree = ast.parse((folder / "src" / Path(*module.split("."), "__init__.py")).read_text())
            assert name in {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    text = "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert "${" not in text.replace("${{", ""), "a word of the template was left"


def test_it_is_formatted(tmp_path: Path) -> None:
    """Every pair of roles, as ruff with its defaults and long lines would have it."""
    ruff = [sys.executable, "-m", "ruff"]
    for i, kinds in enumerate([*itertools.combinations(EVERYTHING, 2), EVERYTHING]):
        folder = create(f"pair_{i}", kinds, tmp_path)
        for command in (["check", "--select", "E,F,I,W,B", "--line-length", "160"], ["format", "--check", "--line-length", "150"]):
            options = [command[0], "--isolated", "--no-cache", *command[1:], "."]
            done = subprocess.run([*ruff, *options], cwd=folder, capture_output=True, text=True)  # its own package is the first party there
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("My-Method", ["editor"], "lower-case"),
        ("class", ["editor"], "Python name"),
        ("_x", ["editor"], "Python name"),
        ("../up", ["editor"], "Python name"),
        ("json", ["editor"], "is taken"),
        ("numpy", ["editor"], "is taken"),
        ("latest", ["selector"], "selfimprove's"),
        ("mine", ["editr"], "did you mean editor"),
        ("mine", [], "at least one role"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, kinds: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        create(name, kinds, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["new", "mine", "--into", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []


def test_it_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "mine", "--roles", "rewarder", "--into", str(tmp_path)]) == 0
    assert "selfimprove run strategy=mine" in capsys.readouterr().out


def test_the_examples_of_middleware_and_tracker_do_what_they_say(tmp_path: Path) -> None:
    """Longer texts are rewarded less by the price of their words; a round that is told again after a kill stands once."""
    folder = create("terse_example", ["middleware", "observer"], tmp_path)
    made = {}
    for kind in ("middleware", "observer"):
        spec = importlib.util.spec_from_file_location(f"terse_example_{kind}", folder / "src" / "terse_example" / f"{kind}.py")
        assert spec is not None
        assert spec.loader is not None
        made[kind] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made[kind])
    tracker = made["observer"].TerseExampleObserver()
    plain = toy_session(tmp_path / "plain", rounds=1).improve()
    one = toy_session(tmp_path / "run", rounds=1, middleware=[made["middleware"].TerseExampleMiddleware(price=0.01, free=2)], observers=[tracker])
    lineage = one.improve()
    for trial, before, after in zip(plain.round(0).trials, plain.round(0).rewards, lineage.round(0).rewards, strict=True):
        words = max(0, len(trial.edit.payload.text.split()) - 2)
        assert before.error == after.error
        assert before.score is None or after.score == pytest.approx(before.score - 0.01 * words)
    tracker.round_finished(lineage, one.run)
    [line] = (tmp_path / "run" / "terse_example.jsonl").read_text().splitlines()
    assert json.loads(line)["round"] == 1
