"""The tutorial is the plugin, and followed literally it leads from an empty folder to a benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tutorial
from fresh import CORE, TOP, Environment, copied, wheel

from selfimprove.cli import main

BLOCKS = tutorial.blocks()


def test_its_files_are_the_plugin_s() -> None:
    text = tutorial.TUTORIAL.read_text(encoding="utf-8")
    assert tutorial.written(text) == text, "write them again: python tests/tutorial.py"
    shown = {b.title for b in BLOCKS if b.is_file and not b.title.startswith("terse/")}
    package = tutorial.PLUGIN / "src" / tutorial.OURS
    files = [p for p in package.rglob("*") if p.suffix in (".py", ".yaml") and p.stat().st_size]
    assert {f"src/{tutorial.THEIRS}/{p.relative_to(package).as_posix()}" for p in files} <= shown, "the plugin has files that the tutorial leaves out"


def test_a_plugin_of_the_size_that_it_says() -> None:
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (tutorial.PLUGIN / "src").rglob("*.py"))
    assert lines < 150


@pytest.mark.slow
def test_the_tutorial_followed_literally(tmp_path: Path) -> None:
    """Every file written and every command run where it stands; those with the embedded model have a test of their own."""
    for name in ("core", "seal"):
        source = copied(CORE, tmp_path / name) if name == "core" else copied(["plugins/seal"], tmp_path / name) / "plugins" / "seal"
        wheel(source, tmp_path)
    fresh = Environment(tmp_path / "env")
    fresh.pip("install", "--quiet", "--no-deps", *tmp_path.glob("*.whl"))
    (fresh.bin / "pip").write_text(f'#!/bin/sh\nexec {fresh.bin / "python"} -m pip "$@"\n')
    (fresh.bin / "pytest").write_text(f'#!/bin/sh\nexec {fresh.bin / "python"} -m pytest -p no:cacheprovider "$@"\n')
    for name in ("pip", "pytest"):
        (fresh.bin / name).chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir()
    # pip reads false as "build without isolation" here: what a package is built with is borrowed, and no index is asked
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")},
        "PATH": f"{fresh.bin}:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_NO_INDEX": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    ran = []
    for block in BLOCKS:
        if block.is_file:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and not block.title:
            words = ["bash", "-euo", "pipefail", "-c", f"{block.text}\npwd > {tmp_path / 'where'}"]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
            folder = Path((tmp_path / "where").read_text().strip())
            ran += block.text.splitlines()
    assert sum(c.startswith("selfimprove ") for c in ran) >= 9
    top = tmp_path / "empty"
    found = json.loads((top / "prompt_evolution" / "runs" / "bench" / "result.json").read_text())
    assert {a["name"] for a in found["arms"]} == {"seal", "prompt_evolution", "greedy"}
    assert not found["failures"]
    told = [json.loads(line) for line in (top / "runs" / "both" / "terse.jsonl").read_text().splitlines()]
    assert [line["round"] for line in told] == [1, 2]


@pytest.mark.slow
def test_its_commands_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [short] = [b.text.split() for b in BLOCKS if b.title == "with the embedded model"]
    [long] = [b.text for b in BLOCKS if b.title == "with the embedded model, for a long time"]
    assert main(short[1:]) == 0
    assert (tmp_path / "runs" / "small" / "journal.jsonl").exists()
    command = f"{sys.executable} -m selfimprove.cli {long.strip().removeprefix('selfimprove ')} --dry-run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_suite_that_compares_prompts_with_weights_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"suite={TOP / 'benchmarks' / 'suites' / 'prompts.yaml'}", "--dry-run"]) == 0
    assert "prompt_evolution" in capsys.readouterr().out
