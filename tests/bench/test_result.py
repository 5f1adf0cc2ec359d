"""What a result says of cells that cannot be measured or read: a real benchmark of two cells, damaged."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from selfimprove.bench.result import SCHEMA
from selfimprove.cli import main

WORDS = ["bench", "suite=smoke", "seeds=1", "nulls=[greedy]", "budget.flops=1e9", "--out"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*WORDS, str(out)]) == 0
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def cell(out: Path, arm: str = "toy") -> Path:
    """The run folder of an arm's only cell."""
    found = json.loads((out / "result.json").read_text())
    [key] = [c["key"] for a in found["arms"] if a["name"] == arm for c in a["cells"]]
    return out / "cells" / str(key)


DAMAGED = {
    "unmeasured": {"score": None, "error": "the judge is away"},
    "no numbers": {"score": 1.0, "per_item": {"q": "right"}},
}
"""Evaluations that a test may hold, by what is wrong with them."""


def measured_as(found: dict[str, Any], damage: str) -> dict[str, Any]:
    """A recorded test whose evaluations are damaged."""
    return {**found, "scores": [[i, DAMAGED[damage]] for i, _ in found["scores"]]}


def test_what_cells_recorded_is_what_they_were_made_with(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((copy / "result.json").read_text())
    noted = json.loads((cell(copy) / "versions.json").read_text())
    assert found["schema"] == SCHEMA
    assert (found["pieces"][0]["commit"], found["pieces"][0]["versions"]["torch"]) == (noted["git"], noted["packages"]["torch"])
    noted |= {"git": "another", "packages": {**noted["packages"], "torch": "0"}}
    (cell(copy) / "versions.json").write_text(json.dumps(noted))
    assert main([*WORDS, str(copy)]) == 0
    assert "The cells were not all run with one commit and the same versions: commit" in capsys.readouterr().out
    [piece] = json.loads((copy / "result.json").read_text())["pieces"]
    assert "another" in piece["commit"]
    assert piece["versions"]["torch"].startswith("0, ")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("test.json", '{"root": ', "test.json cannot be read"),
        ("test.json", "{}", "test.json holds no result (KeyError"),
        ("test.json", "null", "test.json holds no result (TypeError"),
        ("test.json", "no numbers", "test.json holds no result (ValueError"),
        ("test.json", "unmeasured", "its test: the judge is away"),
        ("journal.jsonl", None, "holds no journal.jsonl"),
        ("journal.jsonl", "{}\n", "journal of schema version None"),
        ("journal.jsonl", "[" * 100_000 + "\n", "holds what no run writes (RecursionError"),
        ("identity.json", "{}", "names no test split"),
    ],
)
def test_a_cell_without_a_test_score_has_failed(copy: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | None, reason: str) -> None:
    path = cell(copy) / name
    if text is None:
        path.unlink()
    elif text in DAMAGED:
        path.write_text(json.dumps(measured_as(json.loads(path.read_text()), text)))
    else:
        path.write_text(text)
    assert main([*WORDS, str(copy)]) == 2
    told = capsys.readouterr()
    assert "1 of 2 cells have no test score" in told.err
    assert "FAILED: toy/toy, seed 0: " in told.out
    assert reason in told.out
    found = json.loads((copy / "result.json").read_text())
    assert [(f["arm"], reason in f["reason"]) for f in found["failures"]] == [("toy", True)]
    assert [c["state"] for a in found["arms"] for c in a["cells"]] == ["failed", "done"]
    assert (copy / "report.html").exists()


def test_a_cell_whose_note_is_lost_is_not_run_again(copy: Path) -> None:
    cell(copy).with_suffix(".json").unlink()
    before = (cell(copy) / "test.json").read_bytes()
    assert main([*WORDS, str(copy)]) == 0
    assert (cell(copy) / "test.json").read_bytes() == before
    assert len(json.loads((copy / "result.json").read_text())["pieces"][0]["openings"]) == 1
