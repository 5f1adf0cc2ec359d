"""`benchmarks/dgm_repair.py`: what is said of its runs, by hand on made-up ones; and a tiny comparison for real, stopped, resumed and reported."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfimprove.errors import ConfigError
from selfimprove.sandbox import Sandbox

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def report() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("_dgm_report")
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(report: ModuleType, arm: str, seed: int, solved: int, initial: int = 2, error: str | None = None) -> Any:
    """A run whose agents solve the first so many of twenty functions, which every seed has of its own."""
    items = [f"{seed}-{i}" for i in range(20)]
    one, two = ({"score": n / 20, "per_item": {name: float(i < n) for i, name in enumerate(items)}} for n in (initial, solved))
    sealed = {"initial": one, "best": {"score": None, "error": error} if error else two, "candidate": "c", "commit": "x"}
    return report.Finished(arm, seed, sealed, [[10.0, 1.0, 0.1], [20.0, 2.0 + seed, solved / 20]])


def test_gains_are_paired_and_a_clear_order_is_found(report: ModuleType) -> None:
    runs = [run(report, arm, seed, n) for arm, n in (("dgm", 18), ("greedy", 9), ("no_archive", 2)) for seed in range(3)]
    found = report.result(runs)
    gain = found["arms"]["dgm"]["gain"]
    assert (gain["score"], gain["by_seed"], gain["functions"]) == (pytest.approx(0.8), pytest.approx([0.8] * 3), 60)
    assert gain["low"] > 0.3
    assert found["arms"]["no_archive"]["gain"]["score"] == 0
    assert found["differences"]["dgm_vs_greedy"]["score"] == pytest.approx(0.45)
    assert found["arms"]["dgm"]["above_twice_the_initial"]["score"] == pytest.approx(0.7)
    assert found["ordering"]["measured"] == ["dgm", "greedy", "no_archive"]
    assert {c["verdict"] for c in found["ordering"]["claims"]} == {"as in the paper"}
    assert [(c["above"], c["below"]) for c in found["ordering"]["claims"]] == [("dgm", "greedy"), ("dgm", "no_archive"), ("greedy", "no_archive")]
    assert all(c["p_holm"] >= c["p"] for c in found["ordering"]["claims"])
    assert "twice as much" in found["doubled"][0]
    assert "less than twice" in found["doubled"][-1]
    assert all(0 <= a[w]["low"] <= a[w]["score"] <= a[w]["high"] <= 1 for a in found["arms"].values() for w in ("initial", "best"))
    json.dumps(found, allow_nan=False)


def test_an_order_that_is_reversed_or_open_is_said_so(report: ModuleType) -> None:
    apart = [run(report, arm, seed, n) for arm, n in (("hgm", 2), ("dgm", 18)) for seed in range(3)]
    assert report.result(apart)["ordering"]["claims"][0]["verdict"] == "the reverse"
    noisy = [run(report, arm, seed, n) for arm, row in (("hgm", (2, 18, 8)), ("dgm", (9, 7, 10))) for seed, n in enumerate(row)]
    words = report.result(noisy)["ordering"]["words"]
    assert "1 are not decided" in words[1]
    assert "not decided" in words[2]
    assert "3 seeds" in words[2]


def test_one_seed_draws_functions_only_and_promises_no_p(report: ModuleType) -> None:
    found = report.result([run(report, "dgm", 0, 10), run(report, "greedy", 0, 4)])
    assert "p" not in found["differences"]["dgm_vs_greedy"]
    assert found["ordering"]["claims"][0]["verdict"] == "not decided"
    assert found["arms"]["dgm"]["best"]["low"] < 0.5 < found["arms"]["dgm"]["best"]["high"]


def test_a_tampered_sealed_measurement_is_no_score(report: ModuleType) -> None:
    runs = [run(report, "dgm", seed, 10, error="void" if seed == 1 else None) for seed in range(3)]
    found = report.result(runs)
    assert found["void"] == {"dgm_s1": "void"}
    assert found["arms"]["dgm"]["best"]["seeds"] == 2
    assert report.result([])["arms"] == {}


def test_curves_at_equal_cost(report: ModuleType) -> None:
    runs = [run(report, "dgm", seed, 10) for seed in range(3)]
    assert report.at_equal_cost(runs, 0) == {"budget": 20.0, "scores": {"dgm": 0.5}}
    seconds = report.at_equal_cost(runs, 1)  # the runs end at 2, 3 and 4 seconds
    assert (seconds["budget"], seconds["scores"]["dgm"]) == (2.0, pytest.approx((0.5 + 0.1 + 0.1) / 3))


def _sandbox() -> bool:
    try:
        return bool(Sandbox("auto"))
    except ConfigError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not _sandbox(), reason="no sandbox works on this machine")
def test_a_tiny_comparison_is_stopped_resumed_and_reported(tmp_path: Path) -> None:
    def compare(*options: str) -> dict[str, Any]:
        script = [sys.executable, "dgm_repair.py", "--seeds", "0", "1", "--arms", "dgm", "hgm", "--children", "2", "--test", "3"]
        files = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
        small = ["task.train=6", "task.validation=3", "task.test=3"]
        subprocess.run([*script, *files, *options, *small], check=True, cwd=BENCHMARKS, capture_output=True, timeout=200)
        return dict(json.loads((tmp_path / "out.json").read_text()))

    stopped = compare("--minutes", "0")
    assert stopped["not_finished"] == ["dgm_s0", "dgm_s1", "hgm_s0", "hgm_s1"]
    whole = compare()
    assert whole["not_finished"] == []
    assert whole["arms"].keys() == {"dgm", "hgm"}
    for arm in whole["arms"].values():
        assert {"score", "low", "high"} <= arm["initial"].keys() & arm["best"].keys() & arm["gain"].keys()
        assert arm["cost"]["cpu_seconds"] > 0
    assert all(len(r["curve"][0]) == 3 for r in whole["runs"].values())
    assert (tmp_path / "out.svg").exists()
    assert str(tmp_path) not in " ".join(whole["command"]), "the command that is recorded makes it anywhere"
    again = compare("--report")
    assert {k: v for k, v in again.items() if k != "commit"} == {k: v for k, v in whole.items() if k != "commit"}
