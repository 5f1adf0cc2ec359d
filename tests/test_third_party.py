"""A third party's path: a plugin written outside the tree, built as a wheel and installed beside a wheel of the core in a fresh environment."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from fresh import CORE, TOP, Environment, copied, wheel

pytestmark = pytest.mark.slow

FILES = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "somebody-brevity"
version = "1.2.3"
dependencies = ["selfimprove"]

[project.entry-points."selfimprove.conf"]
brevity = "brevity.conf"

[tool.setuptools]
packages = ["brevity", "brevity.conf"]

[tool.setuptools.package-data]
"brevity.conf" = ["**/*.yaml"]
""",
    "brevity/__init__.py": '''
from selfimprove import Evaluation, hookimpl, payload
from selfimprove.payloads import Text


class Brevity:
    """`scale` over the number of words."""

    consumes = (Text,)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @hookimpl
    def reward(self, trials):
        words = [len(t.edit.payload.text.split()) for t in trials]
        return [Evaluation(self.scale / n) if n else Evaluation.failed("empty") for n in words]
''',
    "brevity/conf/__init__.py": "",
    "brevity/conf/rewarder/brevity.yaml": "# Prefers short edits.\n_target_: brevity.Brevity\nscale: 1.0\n",
    "brevity/conf/strategy/brevity.yaml": """# @package _global_
# The toy strategy, rewarded for being brief.
defaults:
  - override /editor: toy
  - override /rewarder: brevity
  - override /updater: toy
  - override /evaluator: toy
  - override /task: toy
  - override /engine: toy
""",
}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    plugin = folder / "plugin"
    for name, text in FILES.items():
        (plugin / name).parent.mkdir(parents=True, exist_ok=True)
        (plugin / name).write_text(text)
    core = copied(CORE, folder / "core")
    return wheel(core, folder), wheel(plugin, folder)


def test_a_wheel_holds_every_file(wheels: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(wheels[0]).namelist())
    for path in (TOP / "conf").rglob("*.yaml"):
        assert f"selfimprove/conf/{path.relative_to(TOP / 'conf').as_posix()}" in names
    for path in (TOP / "selfimprove").rglob("*.py"):
        assert path.relative_to(TOP).as_posix() in names
    assert "selfimprove/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "plugins/", "benchmarks/", "conf/"))]


def test_a_strangers_plugin_from_wheel_to_run_and_away(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    core, plugin = wheels
    fresh = Environment(tmp_path / "env")
    fresh.pip("install", "--quiet", "--no-deps", core)
    assert "brevity" not in fresh.run("selfimprove", "list", cwd=tmp_path)

    fresh.pip("install", "--quiet", "--no-deps", plugin)
    listed = fresh.run("selfimprove", "list", cwd=tmp_path)
    rows = [line.split() for line in listed.splitlines() if "brevity" in line]
    assert len(rows) == 2, listed  # a strategy and a rewarder
    assert all({"somebody-brevity", "1.2.3"} <= set(row) for row in rows)
    assert "brevity" in fresh.run("selfimprove", "run", "--help", cwd=tmp_path)

    out = fresh.run("selfimprove", "run", "strategy=brevity", "rewarder.scale=2", "run.folder=run", cwd=tmp_path)
    assert "after round 2" in out
    assert "scale: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert "somebody-brevity" in (tmp_path / "run" / "versions.json").read_text()

    fresh.pip("uninstall", "--quiet", "--yes", "somebody-brevity")
    assert "brevity" not in fresh.run("selfimprove", "list", cwd=tmp_path)
    refused = fresh.run("selfimprove", "run", "strategy=brevity", cwd=tmp_path, expected=2)
    assert "brevity" in refused
    assert "Traceback" not in refused
    assert "Best and worst" in fresh.run("selfimprove", "show", "run", cwd=tmp_path)  # a run stays readable without its plugin
    refused = fresh.run("selfimprove", "resume", "run", cwd=tmp_path, expected=2)
    assert "Traceback" not in refused


def test_a_new_plugin_from_wheel_to_check_and_away(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    """`selfimprove new` outside the tree: its wheel is installed, its tests pass, it is checked and run, and leaves nothing behind."""
    fresh = Environment(tmp_path / "env")
    fresh.pip("install", "--quiet", "--no-deps", wheels[0])
    fresh.run("selfimprove", "new", "terse", "--roles", "editor,rewarder,middleware,observer", cwd=tmp_path)
    built = wheel(tmp_path / "terse", tmp_path)
    before = fresh.files()
    fresh.pip("install", "--quiet", "--no-deps", built)
    assert "terse" in fresh.run("selfimprove", "list", "strategy", cwd=tmp_path)
    assert "passed" in fresh.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "terse", cwd=tmp_path)
    assert "checks passed" in fresh.run("selfimprove", "check", "terse", cwd=tmp_path)
    assert "stopped because" in fresh.run("selfimprove", "run", "strategy=terse", "run.folder=run", cwd=tmp_path)
    assert len((tmp_path / "run" / "terse.jsonl").read_text().splitlines()) == 2
    fresh.pip("uninstall", "--quiet", "--yes", "terse")
    assert fresh.files() == before
    assert "terse" not in fresh.run("selfimprove", "list", cwd=tmp_path)


def variant(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """The stranger's plugin with (file, old, new) changes."""
    for name, text in FILES.items():
        for file, old, new in changes:
            if file == name:
                assert old in text
                text = text.replace(old, new)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_plugins_that_cannot_work_are_named_and_everything_else_works(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    fresh = Environment(tmp_path / "env")
    fresh.pip("install", "--quiet", "--no-deps", *wheels)
    toy = ("selfimprove", "run", "strategy=toy", "--cfg", "job")

    # another distribution with the same option names
    twin = variant(tmp_path / "twin", ("pyproject.toml", "somebody-brevity", "another-brevity"))
    fresh.pip("install", "--quiet", "--no-deps", wheel(twin, tmp_path))
    refused = fresh.run(*toy, cwd=tmp_path, expected=2)
    assert "another-brevity" in refused
    assert "somebody-brevity" in refused
    assert "offered by" in fresh.run("selfimprove", "list", cwd=tmp_path)
    fresh.pip("uninstall", "--quiet", "--yes", "another-brevity")
    fresh.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheels[1])
    fresh.run(*toy, cwd=tmp_path)

    # one whose import fails, and one for hooks that do not exist yet
    package = next((tmp_path / "env").rglob("brevity/__init__.py"))
    package.write_text("import nowhere_to_be_found\n" + package.read_text())
    assert "nowhere_to_be_found" in fresh.run("selfimprove", "doctor", cwd=tmp_path, expected=1)
    assert "BROKEN" in fresh.run("selfimprove", "list", cwd=tmp_path)
    fresh.run(*toy, cwd=tmp_path)
    later = variant(
        tmp_path / "later",
        ("pyproject.toml", "[tool.setuptools]", '[project.entry-points."selfimprove.api"]\nhooks = "v2"\n\n[tool.setuptools]'),
    )
    fresh.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel(later, tmp_path))
    refused = fresh.run("selfimprove", "run", "strategy=brevity", "run.folder=later", cwd=tmp_path, expected=2)
    assert "version v2 of the hooks" in refused
    assert "upgrade selfimprove" in refused
    fresh.run(*toy, cwd=tmp_path)


def test_a_plugin_of_today_runs_with_a_core_whose_hook_has_a_new_argument(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    core = copied(CORE, tmp_path / "core")
    for file, old, new in (
        ("hooks.py", "def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run)", "def reward(self, trials, lineage, run, deadline)"),
        ("loop.py", "hook.reward(trials=trials, ", "hook.reward(deadline=1.0, trials=trials, "),
    ):
        text = (core / "selfimprove" / file).read_text()
        assert old in text
        (core / "selfimprove" / file).write_text(text.replace(old, new))
    fresh = Environment(tmp_path / "env")
    fresh.pip("install", "--quiet", "--no-deps", wheel(core, tmp_path), wheels[1])
    assert "after round 2" in fresh.run("selfimprove", "run", "strategy=brevity", "run.folder=run", cwd=tmp_path)
