from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.bench.inference import Grades, difference, holm, more_seeds, power, probability_of_improvement
from selfimprove.errors import ConfigError

ROOT = Path(__file__).parents[2]

tables = st.integers(2, 6).flatmap(
    lambda seeds: st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=seeds * 4, max_size=seeds * 4), min_size=2, max_size=2)
)


def grades(values: list[float], shared: bool = True) -> Grades:
    rows = np.array(values).reshape(-1, 4)
    return {"task": {s: {f"{'' if shared else s}q{i}": float(g) for i, g in enumerate(row)} for s, row in enumerate(rows)}}


def calibration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration", ROOT / "benchmarks" / "calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


@given(tables, st.booleans())
@settings(max_examples=30)
def test_the_other_way_round_everything_changes_its_sign(pair: list[list[float]], shared: bool) -> None:
    one, other = (grades(v, shared) for v in pair)
    there, back = difference(one, other), difference(other, one)
    assert there.estimate == pytest.approx(-back.estimate)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there.p == pytest.approx(back.p)
    assert there.low <= there.estimate <= there.high
    assert 0 <= there.p <= 1
    assert probability_of_improvement(one, other) == pytest.approx(1 - probability_of_improvement(other, one))


def test_an_arm_does_not_differ_from_itself() -> None:
    one = grades([1, 0, 0, 1, 1, 1, 0, 0])
    found = difference(one, one)
    assert (found.estimate, found.p) == (0, 1)
    assert found.low < 0 < found.high  # that no difference was seen does not say that there is none
    assert probability_of_improvement(one, one) == 0.5


def test_a_difference_that_is_equal_in_all_seeds_is_still_uncertain() -> None:
    one, other = grades([1, 1, 0, 0] * 3), grades([1, 0, 0, 0] * 3)
    found = difference(one, other)
    assert found.estimate == 0.25
    assert found.low < 0.25 < found.high
    assert found.p > 0


def test_means_that_differ_by_rounding_only_are_equal() -> None:
    rows = [[0.1] * 10, [1.0, *[0.0] * 9]]  # whose means are 0.1 but for the last bit
    one = {"task": {s: {f"{s}q{i}": g for i, g in enumerate(row)} for s, row in enumerate(rows)}}
    other = {"task": {s: {f"{s}q{i}": 0.0 for i in range(10)} for s in range(2)}}
    assert difference(one, other).p > 0.01


@given(st.permutations(range(5)), st.booleans())
@settings(max_examples=20)
def test_the_order_of_the_seeds_changes_nothing(order: list[int], shared: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((2, 5, 4)).round(1)
    found = [difference(*(grades(list(v[o].ravel()), shared) for v in values)) for o in (list(range(5)), list(order))]
    assert found[0].p == pytest.approx(found[1].p)


@pytest.mark.parametrize(("seeds", "items", "rate"), [(2, 10, 0.1), (2, 20, 0.05), (3, 10, 0.1), (3, 30, 0.05), (5, 12, 0.02)])
@pytest.mark.parametrize("shared", [True, False])
def test_few_seeds_and_rare_answers_make_no_difference_and_no_equality(seeds: int, items: int, rate: float, shared: bool) -> None:
    rng = np.random.default_rng(2)

    def arm(right: float) -> Grades:
        drawn = rng.random((seeds, items)) < right
        return {"t": {s: {f"{'' if shared else s}q{i}": float(g) for i, g in enumerate(row)} for s, row in enumerate(drawn)}}

    same = [difference(arm(rate), arm(rate)) for _ in range(200)]
    assert np.mean([d.p < 0.05 for d in same]) < 0.08
    apart = [difference(arm(0.1), arm(0.0)) for _ in range(200)]
    assert np.mean([d.low > -0.05 and d.high < 0.05 for d in apart]) < 0.05


def test_two_seeds_in_which_everything_is_right_prove_little() -> None:
    found = difference(grades([1.0] * 8), grades([0.0] * 8))
    assert found.estimate == 1
    assert found.p > 0.01


def test_one_seed_is_no_comparison_and_arms_without_a_common_item_are_told() -> None:
    with pytest.raises(ConfigError, match="two seeds"):
        difference(grades([1, 0, 0, 1]), grades([1, 0, 0, 1]))
    with pytest.raises(ConfigError, match="no item in common"):
        difference({"t": {0: {"a": 1.0}, 1: {"a": 1.0}}}, {"t": {0: {"b": 1.0}, 1: {"b": 1.0}}})


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8))
def test_holm_corrects_upwards_keeps_the_order_and_stays_below_bonferroni(ps: list[float]) -> None:
    corrected = holm(ps)
    assert all(p <= c <= min(1, len(ps) * p) + 1e-12 for p, c in zip(ps, corrected, strict=True))
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_holm_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_power_grows_with_the_effect_and_the_seeds_and_tells_how_many_are_enough() -> None:
    suite = calibration().suite
    found = difference(*suite(np.random.default_rng(0), 5, 0.0, 48, 0.05, False))
    assert power(0.0, found) == pytest.approx(0.05, abs=0.03)
    powers = [power(e, found) for e in (0.02, 0.1, 0.3)]
    assert powers == sorted(powers)
    assert power(0.1, found, 20) > power(0.1, found, 5)
    more = more_seeds(0.1, found)
    assert more is not None
    assert power(0.1, found, 5 + more) >= 0.8
    assert more == 0 or power(0.1, found, 4 + more) < 0.8
    assert more_seeds(1e-6, found) is None


def test_identical_arms_are_called_different_about_one_time_in_twenty() -> None:
    suite, rng = calibration().suite, np.random.default_rng(1)
    ps = [difference(*suite(rng, 5, 0.0, 48, 0.05, n % 2 == 0)).p for n in range(150)]
    assert np.mean([p < 0.05 for p in ps]) < 0.12


def test_what_calibration_found_is_committed_and_holds() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text())
    assert all(s["suites"] >= 1000 for s in found["settings"].values())
    assert found["least_null_called_no_difference"] >= 0.93
    assert found["power_found"] == pytest.approx(found["power_promised"], abs=0.1)
