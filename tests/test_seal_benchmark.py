"""`benchmarks/seal_knowledge.py` on the scripted model: seeds side by side, nothing twice, and every number that is promised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SIZES = ("--train", "2", "--edits", "2", "--rounds", "2", "--test", "3", "--tools-train", "0", "engine=scripted", "editor.inner.replicates=3")


def measured(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of the command, as a user types it."""
    places = ("--work", str(folder / "work"), "--out", str(folder / "out.json"))
    subprocess.run(
        [sys.executable, BENCHMARKS / "seal_knowledge.py", *places, *arguments, *SIZES], check=True, timeout=300, stdout=subprocess.DEVNULL
    )
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def times(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in (folder / "work").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_seeds_are_measured_side_by_side_and_nothing_twice(tmp_path: Path) -> None:
    for seed in (0, 1):
        measured(tmp_path, "--seeds", str(seed))
    before = times(tmp_path)
    found = measured(tmp_path, "--seeds", "0", "1")
    assert times(tmp_path) == before, "with everything measured it only reports"
    arms, questions = found["arms"], 2 * 3 * 6
    assert {"untouched", "passage", "passage_equal_tokens", "edits", "gold", "round_1", "round_2", "seal"} <= set(arms)
    assert all(a["questions"] == questions and a["contexts"] == 6 and "standard_error" in a for a in arms.values())
    assert arms["round_2"] == arms["seal"], "the last round's policy is SEAL's"
    for name in ("seal_vs_edits", "seal_vs_passage", "seal_vs_passage_equal_tokens"):
        assert found["comparisons"][name]["low"] <= found["comparisons"][name]["difference"] <= found["comparisons"][name]["high"]
    assert all("best_of_k_corrected" in one for seed in found["rounds"] for one in seed["seal"])
    assert {"processor", "device", "engine"} <= set(found["machine"])
    assert str(tmp_path) not in json.dumps(found), "no folder of this machine"
