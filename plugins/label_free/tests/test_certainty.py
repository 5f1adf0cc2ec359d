"""Each formula against a hand-computed value, on the scripted and on a real (tiny) model; contracts; strategies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from selfimprove.cli import main
from selfimprove.graders import Exact
from selfimprove.models import Likelihood, Lora
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Edit, Trial
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.session import Session
from selfimprove.testing import RewarderContract, toy_session
from selfimprove_label_free import SelfCertainty, SequenceLikelihood, TokenEntropy

Z = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
"""Logits of two tokens over four words."""


def told(ids: tuple[int, ...]) -> Likelihood:
    logs = Z.log_softmax(-1)
    chosen = logs.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return Likelihood(
        float(chosen.sum()), 2, tuple(chosen.tolist()), tuple((-(logs.exp() * logs).sum(-1)).tolist()), tuple((-logs.mean(-1)).tolist())
    )


def test_self_certainty_by_hand() -> None:
    """logsumexp(z) − mean(z); for the uniform distribution log V, that is a divergence of nothing plus the constant."""
    first = math.log(math.exp(2) + 2 + math.exp(-1)) - 0.25
    assert SelfCertainty().value(told((0, 3))) == pytest.approx((first + math.log(4)) / 2)


def test_entropies_by_hand() -> None:
    p = [math.exp(x) / (math.exp(2) + 2 + math.exp(-1)) for x in (2, 0, 0, -1)]
    entropy = -sum(x * math.log(x) for x in p)
    assert TokenEntropy().value(told((0, 3))) == pytest.approx(-(entropy + math.log(4)))
    assert SequenceLikelihood().value(told((0, 3))) == pytest.approx(math.log(p[0]) - math.log(4))


class TestSelfCertainty(RewarderContract):
    plugin: Any = SelfCertainty

    def make_plugin(self) -> Any:
        return self.plugin()

    def make_roles(self) -> dict[str, Any]:
        asking: Any = {"template": "{context}\n{question}", "max_tokens": 16}
        return {"editor": Rollouts(asking, 2, 3), "updater": PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1)), "evaluator": PassAtK(2)}

    def make_session(self, folder: Path) -> Session:
        return toy_session(folder, grader=Exact(), **{**self.make_roles(), "rewarder": self.make_plugin()})

    def test_no_label_is_read(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        self.make_rewards(session, self.make_trials(session))
        assert session.run.ledger.totals["labels"] == 0

    def test_an_empty_rollout_is_data(self, tmp_path: Path) -> None:
        session = self.make_session(tmp_path)
        root = session.lineage.root
        [found] = self.make_rewards(session, [Trial(Edit((root.id,), Rollout("")), root.derive("bad"))])
        assert found.error == "the rollout has no token"


class TestTokenEntropy(TestSelfCertainty):
    plugin = TokenEntropy


class TestSequenceLikelihood(TestSelfCertainty):
    plugin = SequenceLikelihood


@pytest.mark.parametrize(
    ("strategy", "rewarder"), [("intuitor", SelfCertainty), ("em_rl_token", TokenEntropy), ("em_rl_sequence", SequenceLikelihood)]
)
def test_a_strategy_composes(
    strategy: str, rewarder: type, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"strategy={strategy}", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rewarder"]["_target_"] == f"selfimprove_label_free.{rewarder.__name__}"


def test_seal_with_such_a_reward_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("selfimprove_seal")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy=seal", "rewarder=self_certainty", "task=toy", "engine=toy"]) == 2
    err = capsys.readouterr().err
    assert "SelfEdits (editor) produces SelfEdit, but SelfCertainty (rewarder) consumes Rollout" in err
    assert list(tmp_path.iterdir()) == []
