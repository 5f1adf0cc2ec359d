"""Advantages by hand and by law, the updater's contract, and what it asks the model layer for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.models import Lora
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import ADVANTAGES, PolicyGradient, dr_grpo, group_advantages, grpo, rloo
from selfimprove.records import Candidate, Edit, Evaluation, Trial
from selfimprove.rollouts import Asking, PassAtK, Rollouts
from selfimprove.testing import UpdaterContract, toy_session

LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 1, "batch": 4}
REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.0])


class Words:
    """The number of words of a rollout, or of its question's where there are none."""

    consumes = (Rollout,)

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        return [Evaluation(float(sum(map(len, t.edit.payload.text.split())) + i % 2)) for i, t in enumerate(trials)]


def rollouts(**changes: Any) -> Rollouts:
    return Rollouts(**{"asking": Asking(template="{context}\n{question}", max_tokens=16), "prompts": 2, "samples": 3, **changes})


def test_advantages_by_hand() -> None:
    assert rloo(REWARDS).tolist() == pytest.approx([1 - 1 / 4, -2 / 4, -2 / 4, 1 - 1 / 4, -2 / 4])
    assert dr_grpo(REWARDS).tolist() == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])
    assert grpo(REWARDS).tolist() == pytest.approx(np.array([0.6, -0.4, -0.4, 0.6, -0.4]) / (np.sqrt(0.3) + 1e-4))


@given(
    st.sampled_from(sorted(ADVANTAGES)),
    st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=12),
    st.floats(-5, 5, allow_subnormal=False),
)
def test_advantages_sum_to_nothing_and_do_not_see_a_constant(name: str, rewards: list[float], constant: float) -> None:
    values = np.array(rewards)
    found = ADVANTAGES[name](values)
    scale = 1e-6 * (1 + np.abs(found).max())
    assert abs(found.sum()) < scale * len(values)
    if np.ptp(values) > 1e-3 or not np.ptp(values):
        assert np.allclose(ADVANTAGES[name](values + constant), found, atol=1e-5 * (1 + np.abs(found).max()))


def trial(group: str, i: int) -> Trial:
    return Trial(Edit(("p",), Rollout("x", ids=(1,), logprobs=(-1.0,)), group), Candidate(f"{group}{i}", {}))


def test_groups_are_ragged_and_what_has_no_reward_is_no_member() -> None:
    trials = [trial("a", 0), trial("b", 0), trial("a", 1), trial("a", 2), trial("b", 1), trial("c", 0)]
    rewards = [Evaluation(1.0), Evaluation(0.1), Evaluation.failed("?"), Evaluation(0.0), Evaluation(0.1), Evaluation(float("nan"))]
    assert group_advantages(trials, rewards, rloo) == [1.0, 0.0, None, -1.0, 0.0, None]


class TestContract(UpdaterContract):
    def make_plugin(self) -> Any:
        return PolicyGradient(LORA)

    def make_roles(self) -> dict[str, Any]:
        return {"editor": rollouts(), "rewarder": Words(), "evaluator": PassAtK(2)}


class TestContractWithAKLTerm(TestContract):
    def make_plugin(self) -> Any:
        return PolicyGradient(LORA, "grpo", beta=0.1)


def run_of(folder: Path, updater: Any, rounds: int = 2, **roles: Any) -> Any:
    return toy_session(folder, rounds=rounds, editor=rollouts(), rewarder=Words(), updater=updater, evaluator=PassAtK(2), **roles)


def test_the_optimizer_is_a_part_that_goes_on(tmp_path: Path) -> None:
    lineage = run_of(tmp_path, PolicyGradient(LORA)).improve()
    first, second = lineage.round(0).children + lineage.round(1).children
    assert first.parts["policy.optimizer"].kind == "optimizer"
    assert second.parts["policy.optimizer"] != first.parts["policy.optimizer"]


@pytest.mark.parametrize(("algorithm", "weight"), [("rloo", 1.0), ("grpo", 1 / 3), ("dr_grpo", 1 / 20)])
def test_what_a_token_weighs(tmp_path: Path, algorithm: str, weight: float) -> None:
    """Four rollouts of three tokens, two of which have an advantage; a step's loss is a mean over all four."""
    session = run_of(tmp_path, updater := PolicyGradient(LORA, algorithm, longest=20))
    root = session.lineage.root
    chosen = [(Rollout("a b c", ids=(1, 2, 3), logprobs=(-1.0,) * 3), a) for a in (1.0, -1.0)]
    request = updater.request(session.run, session.lineage, root, chosen, 4)
    assert [s.weights for s in request.samples] == [pytest.approx((weight / 4,) * 3)] * 2
    assert [s.advantages for s in request.samples] == [(1.0,) * 3, (-1.0,) * 3]
    assert all(s.reference == () for s in request.samples)


def test_the_reference_is_the_root_or_the_policy_that_sampled(tmp_path: Path) -> None:
    chosen = [(Rollout("a b", ids=(1, 2), logprobs=(-0.7, -0.3)), 1.0)]
    session = run_of(tmp_path / "previous", updater := PolicyGradient(LORA, beta=0.1, reference="previous"))
    assert updater.request(session.run, session.lineage, session.lineage.root, chosen, 1).samples[0].reference == (-0.7, -0.3)
    session = run_of(tmp_path / "root", updater := PolicyGradient(LORA, beta=0.1))
    assert len(updater.request(session.run, session.lineage, session.lineage.root, chosen, 1).samples[0].reference) == 2
    assert session.run.ledger.totals["scored_tokens"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "ppo"}, "one of rloo, grpo, dr_grpo"),
        ({"reference": "ema"}, "root or previous"),
        ({"longest": 0}, "at least 1"),
        ({"clip_low": -1.0}, "clip_low"),
        ({"lora": {**LORA, "schedule": "linear"}}, "schedule=constant"),
        ({"lora": {"rank": 1}}, "does not fit"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyGradient(**{"lora": LORA, **change})


def test_settings_may_be_a_lora() -> None:
    made = PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1)).lora
    assert isinstance(made, Lora)
