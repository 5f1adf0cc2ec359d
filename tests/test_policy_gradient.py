"""Advantages by hand and by law, the updater's contract, and what it asks the model layer for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import AdmissionError, ConfigError
from selfimprove.hooks import hookimpl
from selfimprove.journal import lineage_digest
from selfimprove.models import Lora, Models, Reinforce
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import ADVANTAGES, PolicyGradient, dr_grpo, group_advantages, grpo, penalised, rloo, token_advantages
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial
from selfimprove.rollouts import Asking, PassAtK, Rollouts
from selfimprove.testing import NoopRewarder, UpdaterContract, digest_after_kill, kill_points, toy_session

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


def of_tokens(group: str, i: int, tokens: int) -> Trial:
    return Trial(Edit(("p",), Rollout("x", ids=(1,) * tokens, logprobs=(-1.0,) * tokens), group), Candidate(f"{group}{i}", {}))


def trial(group: str, i: int) -> Trial:
    return of_tokens(group, i, 1)


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


class TestContractWithAnAverage(TestContract):
    def make_plugin(self) -> Any:
        return PolicyGradient(LORA, beta=0.1, kl="reward", reference="ema")


def run_of(folder: Path, updater: Any, rounds: int = 2, **roles: Any) -> Any:
    return toy_session(folder, rounds=rounds, **{"editor": rollouts(), "rewarder": Words(), "updater": updater, "evaluator": PassAtK(2), **roles})


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
    chosen = [(Rollout("a b c", ids=(1, 2, 3), logprobs=(-1.0,) * 3), (a, a / 2, 0.0), ()) for a in (1.0, -1.0)]
    request = updater.request(session.run, session.lineage, root, chosen, 4)
    assert [s.weights for s in request.samples] == [pytest.approx((weight / 4,) * 3)] * 2
    assert [s.advantages for s in request.samples] == [(1.0, 0.5, 0.0), (-1.0, -0.5, 0.0)]
    assert all(s.reference == () for s in request.samples)


def asked(folder: Path, monkeypatch: pytest.MonkeyPatch, updater: PolicyGradient, rounds: int = 1, **roles: Any) -> tuple[Lineage, list[Reinforce]]:
    """The lineage of a run, and what the model layer was asked for."""
    found: list[Reinforce] = []
    reinforce = Models.reinforce

    def noted(self: Models, requests: Sequence[Reinforce]) -> Any:
        found.extend(requests)
        return reinforce(self, requests)

    monkeypatch.setattr(Models, "reinforce", noted)
    return run_of(folder, updater, rounds, **roles).improve(), found


def test_the_reference_is_the_root_or_the_policy_that_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("previous", -0.5), ("root", -0.7)):  # the scripted model samples at −0.5 and scores at −0.7
        _, requests = asked(tmp_path / name, monkeypatch, PolicyGradient(LORA, beta=0.1, reference=name))
        assert {x for r in requests for s in r.samples for x in s.reference} == {expected}
        assert all(r.objective.beta == 0.1 for r in requests)


def test_a_kl_term_in_the_reward_is_none_in_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, requests = asked(tmp_path, monkeypatch, PolicyGradient(LORA, beta=0.1, kl="reward"))
    assert requests
    assert all(r.objective.beta == 0 and s.reference == () for r in requests for s in r.samples)


def test_the_penalty_by_hand() -> None:
    rollout = Rollout("a b", ids=(1, 2), logprobs=(-0.5, -1.0))
    found = penalised(rollout, Evaluation(1.0, credit=(0.25, 0.75)), (-0.7, -0.6), 0.1)
    assert found.score == pytest.approx(1.0 - 0.1 * (0.2 - 0.4))
    assert found.credit == pytest.approx((0.25 - 0.02, 0.75 + 0.04))
    assert penalised(rollout, Evaluation.failed("?"), (), 0.1).score is None


def test_the_average_is_a_part_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage, requests = asked(tmp_path, monkeypatch, PolicyGradient(LORA, beta=0.1, reference="ema"), rounds=3)
    means = [c.parts["policy.ema"] for c in lineage if c.parents]
    assert len({m.digest for m in means}) == len(means) == 3
    assert all(c.parts["policy.ema"] != c.parts["policy"] for c in lineage if c.parents)
    assert all(s.reference for r in requests for s in r.samples)


def test_a_killed_run_goes_on_with_the_same_average_and_moments(tmp_path: Path) -> None:
    updater = PolicyGradient(LORA, "grpo", beta=0.1, kl="reward", reference="ema")
    roles = {"editor": rollouts(samples=2), "rewarder": NoopRewarder(), "updater": updater, "evaluator": None}
    maker = partial(toy_session, rounds=2, **roles)
    total = kill_points(maker, tmp_path / "whole")
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in range(3, total, max(1, total // 4)):
        assert digest_after_kill(maker, tmp_path / str(at), at) == whole, f"killed at instant {at} of {total}"


class Credited(Words):
    """The words' reward, credited to the first token alone."""

    gives_credit = True

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        return [
            Evaluation(e.score, credit=(float(e.score or 0), *[0.0] * (len(t.edit.payload.ids) - 1)))
            for t, e in zip(trials, super().reward(trials), strict=True)
        ]


def test_credit_becomes_advantages_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, requests = asked(tmp_path, monkeypatch, PolicyGradient(LORA, credit="own"), rewarder=Credited())
    assert any(len(set(s.advantages)) > 1 for r in requests for s in r.samples)


def test_token_advantages_by_hand() -> None:
    """Credits 1, 0 and 2 of a group of two rollouts: the mean is 1; what is to come is summed."""
    trials = [of_tokens("g", 0, 2), of_tokens("g", 1, 1)]
    rewards = [Evaluation(1.0, credit=(1.0, 0.0)), Evaluation(2.0, credit=(2.0,))]
    assert token_advantages(trials, rewards, dr_grpo, to_go=False) == [(0.0, -1.0), (1.0,)]
    assert token_advantages(trials, rewards, dr_grpo, to_go=True) == [(-1.0, -1.0), (1.0,)]
    assert token_advantages(trials, rewards, rloo, to_go=False) == [(0.0, -1.5), (1.5,)]
    with pytest.raises(ConfigError, match="each of a rollout's 2 tokens, and the rewarder gave 1"):
        token_advantages(trials, [Evaluation(1.0, credit=(1.0,)), rewards[1]], rloo, to_go=False)


@given(
    st.lists(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=5), min_size=1, max_size=5), st.sampled_from(sorted(ADVANTAGES))
)
def test_advantages_of_tokens_sum_to_nothing_in_their_group(credits: list[list[float]], name: str) -> None:
    trials = [of_tokens("g", i, len(c)) for i, c in enumerate(credits)]
    rewards = [Evaluation(sum(c), credit=tuple(c)) for c in credits]
    own, to_go = (token_advantages(trials, rewards, ADVANTAGES[name], x) for x in (False, True))
    values = [x for a in own for x in a or ()]
    assert abs(sum(values)) < 1e-6 * (1 + max(map(abs, values))) * len(values)
    assert [a[0] for a in to_go if a] == pytest.approx([sum(a) for a in own if a], abs=1e-6 * (1 + max(map(abs, values))))


def test_without_credit_tokens_have_none_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="Words \\(rewarder\\) gives none"):
        run_of(tmp_path, PolicyGradient(LORA, credit="own"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "ppo"}, "one of rloo, grpo, dr_grpo"),
        ({"reference": "first"}, "one of root, previous, ema"),
        ({"kl": "both"}, "one of loss, reward"),
        ({"credit": "all"}, "one of none, own, to_go"),
        ({"kl": "reward", "reference": "previous", "beta": 0.1}, "sampled the rollouts itself"),
        ({"decay": 1.1}, "decay between 0 and 1"),
        ({"longest": 0}, "longest >= 1"),
        ({"ratio": "text"}, "updater.ratio is one of token, sequence"),
        ({"ratio": "sequence", "algorithm": "grpo"}, "choose algorithm=rloo"),
        ({"ratio": "sequence", "credit": "own"}, "choose algorithm=rloo"),
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
