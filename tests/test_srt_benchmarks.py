"""The benchmarks of rewards without labels: every arm is a configuration that builds, and what several seeds came to is their mean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from selfimprove import config

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    """`srt_arithmetic.py` and `collapse.py`, as Python finds them when a file is run."""
    for package in ("selfimprove_srt", "selfimprove_label_free"):
        pytest.importorskip(package)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: import_module(name) for name in ("srt_arithmetic", "collapse")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_every_arm_is_a_configuration(benchmarks: dict[str, ModuleType]) -> None:
    arithmetic, collapse = benchmarks["srt_arithmetic"], benchmarks["collapse"]
    assert set(arithmetic.MAIN) < set(arithmetic.TRAINED)
    for overrides in (*([*o, *arithmetic.SETTING] for o in arithmetic.TRAINED.values()), *([*o, *collapse.SETTING] for o in collapse.RUNS.values())):
        config.check(config.compose(["strategy=srt", *overrides]))


def test_seeds_are_averaged_by_round_over_those_that_came_so_far(benchmarks: dict[str, ModuleType]) -> None:
    numbers = {"truth": 0.5, "root": 0.25, "rollout_truth": 0.1, "last_reward": 1.0, "last_truth": 0.0}
    short = {**numbers, "reward": None, "rounds": 1, "curve": [{"reward": 0.0}]}
    long = {**numbers, "reward": 1.0, "truth": 0.0, "rounds": 2, "curve": [{"reward": 1.0, "accuracy": 0.2}, {"reward": 0.8}]}
    found = benchmarks["collapse"].over_seeds([short, long])
    assert (found["reward"], found["truth"], found["rounds"]) == (1.0, 0.25, 2), "a run that rewarded nobody has no reward to average"
    assert found["curve"] == [{"reward": 0.5, "accuracy": 0.2, "runs": 2}, {"reward": 0.8, "runs": 1}]
