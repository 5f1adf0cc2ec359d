"""Reliability and the winner's curse, against simulations whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.payloads import Text
from selfimprove.records import Candidate, Edit, Evaluation, Part, Trial
from selfimprove.statistics import by_edit, reward_statistics, split_half

ROOT = Candidate.root(policy=Part("model", "m"))


def trials_of(table: np.ndarray) -> tuple[list[Trial], list[Evaluation]]:
    """Trials and rewards from scores.  (contexts, K, R); nan is a trial without a score"""
    trials, rewards = [], []
    for g, group in enumerate(table):
        for e, replicates in enumerate(group):
            written = Edit((ROOT.id,), Text(f"{g}.{e}"), str(g))
            for r, score in enumerate(replicates):
                trials.append(Trial(written, ROOT, r))
                rewards.append(Evaluation.failed("no") if math.isnan(score) else Evaluation(float(score)))
    return trials, rewards


def simulated(seed: int, contexts: int, edits: int, replicates: int, true_sd: float, noise_sd: float) -> np.ndarray:
    """Rewards: a context's level, an edit's true value, and noise of each replicate."""
    chance = np.random.default_rng(seed)
    level = chance.normal(0, 3, (contexts, 1, 1))
    true = chance.normal(0, true_sd, (contexts, edits, 1)) if true_sd else np.zeros((contexts, edits, 1))
    return level + true + chance.normal(0, noise_sd, (contexts, edits, replicates))


@pytest.mark.parametrize("replicates", [2, 3, 4, 5])
@pytest.mark.parametrize(("true_sd", "noise_sd"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (0.0, 1.0)])
def test_reliability_is_the_share_of_variance_that_is_true(replicates: int, true_sd: float, noise_sd: float) -> None:
    """Var(true) / (Var(true) + Var(noise) / R), the definition of the mean's reliability; a context's level does not count."""
    found = reward_statistics(*trials_of(simulated(0, 2000, 5, replicates, true_sd, noise_sd)))["reliability"]
    assert found == pytest.approx(true_sd**2 / (true_sd**2 + noise_sd**2 / replicates), abs=0.03)


def test_the_winners_curse_is_corrected() -> None:
    """Edits that do not differ: the best of five seems to gain half a standard deviation and more, and gains nothing."""
    found = reward_statistics(*trials_of(simulated(2, 3000, 5, 2, 0.0, 1.0)))
    assert found["best_of_k"] > 0.7
    assert abs(found["best_of_k_corrected"]) < 0.03


@pytest.mark.parametrize("replicates", [2, 3, 5])
def test_the_corrected_gain_is_that_of_choosing_on_the_other_replicates(replicates: int) -> None:
    """Against the true values, which only a simulation knows: unbiased, and a little below what choosing on all replicates gains."""
    chance = np.random.default_rng(3)
    true = chance.normal(0, 1, (4000, 5))
    table = true[..., None] + chance.normal(0, 1, (4000, 5, replicates))
    found = reward_statistics(*trials_of(table))

    def gained(chosen_by: np.ndarray) -> float:
        return float(np.mean(np.take_along_axis(true, chosen_by.argmax(axis=1)[:, None], axis=1)[:, 0] - true.mean(axis=1)))

    on_the_others = np.mean([gained(np.delete(table, r, axis=2).mean(axis=2)) for r in range(replicates)])
    on_all = gained(table.mean(axis=2))
    assert found["best_of_k_corrected"] == pytest.approx(on_the_others, abs=0.04)
    assert found["best_of_k_corrected"] < on_all + 0.04 < found["best_of_k"]


def test_without_noise_there_is_nothing_to_correct() -> None:
    exact = reward_statistics(*trials_of(simulated(4, 500, 5, 2, 1.0, 1e-9)))
    assert exact["best_of_k"] == pytest.approx(exact["best_of_k_corrected"], abs=1e-6)
    assert exact["reliability"] == pytest.approx(1.0, abs=1e-6)


def test_ties_are_ties_whatever_the_order_of_the_replicates() -> None:
    """Sums of the same numbers differ in the last bit by their order."""
    table = np.array([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.0, 0.0, 0.0]]])
    assert reward_statistics(*trials_of(table))["ties_at_top"] == 1.0


def test_what_was_not_measured_in_every_replicate_does_not_count() -> None:
    """One edit that lost a replicate takes no other's away."""
    whole = simulated(7, 4, 3, 2, 1.0, 1.0)
    torn = np.concatenate([whole, np.full((4, 1, 2), math.nan)], axis=1)
    torn[:, 3, 0] = 9.0
    assert reward_statistics(*trials_of(torn)) == reward_statistics(*trials_of(whole))


def test_groups_of_one_have_nothing_to_choose() -> None:
    assert reward_statistics(*trials_of(simulated(8, 10, 1, 2, 1.0, 1.0))) == {}


def test_ties_share_the_choice() -> None:
    """Coarse rewards without any effect: breaking ties by position would not be neutral where positions differ."""
    chance = np.random.default_rng(5)
    table = chance.integers(0, 2, (4000, 4, 2)).astype(float)
    found = reward_statistics(*trials_of(table))
    assert abs(found["best_of_k_corrected"]) < 0.02
    assert found["ties_at_top"] == pytest.approx(sum((t.mean(1) == t.mean(1).max()).sum() > 1 for t in table) / 4000)


def test_one_replicate_has_no_reliability() -> None:
    found = reward_statistics(*trials_of(simulated(6, 10, 5, 1, 1.0, 1.0)))
    assert set(found) == {"best_of_k", "ties_at_top"}


def test_nothing_measured_is_no_statistics() -> None:
    assert reward_statistics([], []) == {}
    assert reward_statistics(*trials_of(np.full((2, 3, 2), math.nan))) == {}


@given(
    st.lists(
        st.lists(st.lists(st.floats(-1, 1, allow_subnormal=False) | st.just(math.nan), min_size=2, max_size=2), min_size=1, max_size=4), max_size=4
    )
)
def test_whatever_was_measured(table: list[list[list[float]]]) -> None:
    trials, rewards = [], []
    for g, group in enumerate(table):
        one, two = trials_of(np.array([group]))
        trials += [Trial(Edit(t.edit.parents, t.edit.payload, f"{g}"), ROOT, t.replicate) for t in one]
        rewards += two
    found = reward_statistics(trials, rewards)
    assert all(math.isfinite(v) for v in found.values()), "a metric is a number, or absent"
    if found:
        assert found["best_of_k"] >= -1e-12
        assert 0 <= found["ties_at_top"] <= 1
        assert -1 <= found.get("reliability", 0.0) <= 1


@pytest.mark.parametrize("table", [np.zeros((5, 2)), np.ones((2, 4)), np.ones((5, 1)), np.array([[1.0, 0], [1, 0], [1, 0]])])
def test_where_there_is_no_variance_there_is_no_reliability(table: np.ndarray) -> None:
    assert math.isnan(split_half(table))


def test_opposed_halves() -> None:
    """Spearman and Brown's formula has no lower bound; a correlation has."""
    assert split_half(np.array([[1.0, -1.0], [-1.0, 1.0], [0.5, -0.5]])) == -1.0
    assert split_half(np.array([[1.0, -1.0], [-1.0, 1.0], [0.5, -0.4]])) == -1.0


def test_by_edit_keeps_edits_apart_that_are_equal() -> None:
    """Two samples may be the same text: they are two edits."""
    same = [Edit((ROOT.id,), Text("x"), "g") for _ in range(2)]
    found = by_edit([Trial(e, ROOT, r) for e in same for r in range(2)], [Evaluation(float(i)) for i in range(4)])
    assert [values for _, values in found] == [[0.0, 1.0], [2.0, 3.0]]
