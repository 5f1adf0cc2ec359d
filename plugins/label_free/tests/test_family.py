"""EM-FT, Self-Rewarding, SPIN, STaR and ReST-EM: each formula by hand, contracts, and every strategy for a round on the scripted model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import config
from selfimprove.cli import main
from selfimprove.errors import ConfigError
from selfimprove.graders import Contains, Exact
from selfimprove.models import Generate
from selfimprove.payloads import Rollout
from selfimprove.records import Edit, Evaluation, Trial
from selfimprove.rewarders import Verifier
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.runfolder import flat
from selfimprove.session import Session
from selfimprove.testing import RewarderContract, ScriptedEngine, UpdaterContract, toy_session
from selfimprove_label_free import SPIN, EntropyMinimisation, SelfJudge, STaR, TokenEntropy
from selfimprove_label_free.judge import points

LORA: dict[str, Any] = {"rank": 1, "alpha": 1, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 1, "batch": 4}
ASKING: Any = {"template": "{context}\n{question}", "max_tokens": 16}


def roles(**changes: Any) -> dict[str, Any]:
    return {"editor": Rollouts(ASKING, 2, 3), "rewarder": TokenEntropy(), "updater": EntropyMinimisation(LORA), "evaluator": PassAtK(2), **changes}


def session(folder: Path, engine: Any = None, **changes: Any) -> Session:
    return toy_session(folder, rounds=1, grader=Exact(), engine=engine, **roles(**changes))


# ---- EM-FT ----


def test_every_token_weighs_one_over_its_rollouts_length_and_the_step(tmp_path: Path) -> None:
    """(1/N) Σ_i (1/T_i) Σ_t H: two rollouts of 2 and 4 tokens."""
    one = session(tmp_path, updater=(updater := EntropyMinimisation(LORA)))
    rollouts = [Rollout("a", ids=(1,) * n, logprobs=(-1.0,) * n, temperature=0.7) for n in (2, 4)]
    request = updater.request(one.run, one.lineage, one.lineage.root, rollouts)
    assert [s.weights for s in request.samples] == [(1 / 4,) * 2, (1 / 8,) * 4]
    assert all(set(s.advantages) == {0.0} for s in request.samples)
    assert (request.objective.entropy, request.objective.temperature) == (1.0, 0.7)


class TestEntropyMinimisation(UpdaterContract):
    def make_plugin(self) -> Any:
        return EntropyMinimisation(dict(LORA))

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles().items() if r != "updater"}


def test_settings_of_a_step_that_does_not_go_on_are_refused() -> None:
    with pytest.raises(ConfigError, match="schedule=constant"):
        EntropyMinimisation({**LORA, "schedule": "linear"})
    with pytest.raises(ConfigError, match="no entropy term"):
        EntropyMinimisation({**LORA, "trainer": "trl"})


# ---- Self-Rewarding ----


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("It is relevant (1 point) and complete.\nScore: 4", 4),
        ("Score: 2. On reflection, **Score:** 3", 3),
        ("score = 5/5", 5),
        ("Score: 0", 0),
        ("Score: 7", None),
        ("Score: 45", None),
        ("Score: 999999999999", None),
        ("4 points", None),
        ("", None),
    ],
)
def test_points_of_a_verdict(verdict: str, expected: int | None) -> None:
    assert points(verdict) == expected


@given(st.text())
def test_points_of_anything_are_on_the_scale(text: str) -> None:
    found = points(text)
    assert found is None or 0 <= found <= 5


TEMPLATE = "Review {question} and {answer}"


def judged(folder: Path, verdicts: Sequence[str], rollout: Rollout) -> tuple[Evaluation, list[str]]:
    """The reward of one rollout where the judge says these, and what it was asked."""
    said, asked = list(verdicts), []

    def script(request: Generate, known: Any) -> str:
        asked.append(request.prompt)
        return said.pop(0)

    one = session(folder, ScriptedEngine(script), rewarder=SelfJudge(TEMPLATE, samples=len(verdicts)))
    root = one.lineage.root
    [found] = one.hook.reward(trials=[Trial(Edit((root.id,), rollout), root.derive("a"))], lineage=one.lineage, run=one.run)
    return found, asked


def test_the_reward_is_the_mean_of_the_verdicts_that_hold_a_score(tmp_path: Path) -> None:
    found, asked = judged(tmp_path, ["Score: 4", "I cannot say", "Score: 1"], Rollout("the {question}", "why {answer}?"))
    assert found.score == pytest.approx((4 + 1) / 2)
    assert found.metrics == {"read": pytest.approx(2 / 3)}
    assert asked == ["Review why {answer}? and the {question}"] * 3, "what a model wrote is no template"


def test_a_template_that_begins_the_score_is_answered_by_the_number(tmp_path: Path) -> None:
    said = [" 4", "3\n", "nothing", " 7"]
    one = session(tmp_path, ScriptedEngine(lambda *_: said.pop(0)), rewarder=SelfJudge(f"{TEMPLATE}\nScore:", samples=4, chat=False, stop=("\n",)))
    root = one.lineage.root
    [found] = one.hook.reward(trials=[Trial(Edit((root.id,), Rollout("a", "b")), root.derive("a"))], lineage=one.lineage, run=one.run)
    assert (found.score, found.metrics) == (pytest.approx(3.5), {"read": 0.5})


def test_without_a_score_there_is_no_reward(tmp_path: Path) -> None:
    found, _ = judged(tmp_path, ["no", "Score: 9"], Rollout("a", "b"))
    assert (found.score, found.error) == (None, "no verdict holds a score")


class TestSelfJudge(RewarderContract):
    def make_plugin(self) -> Any:
        return SelfJudge(TEMPLATE, max_tokens=8)

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles().items() if r != "rewarder"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, rewarder=self.make_plugin())

    def test_no_label_is_read(self, tmp_path: Path) -> None:
        one = self.make_session(tmp_path)
        self.make_rewards(one, self.make_trials(one))
        assert one.run.ledger.totals["labels"] == 0


@pytest.mark.parametrize("change", [{"template": "{question}"}, {"template": "{answer}"}, {"samples": 0}, {"top_p": 0.0}, {"temperature": -1.0}])
def test_a_judge_that_cannot_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rewarder"):
        SelfJudge(**{"template": TEMPLATE, **change})


# ---- SPIN ----

SELF_PLAY: dict[str, Any] = {**LORA, "trainer": "trl"}


def test_the_gold_answer_is_played_against_the_policy_s_own(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    one = session(tmp_path, updater=(updater := SPIN(SELF_PLAY, answer="It is {answer}.")), rewarder=Verifier())
    item = one.run.task.train[0]
    first, second = item.questions[:2]
    gold = one.run.task.labels([first, second])
    rollouts = [Rollout("no idea", "p1", question=first.id), Rollout(f"It is {gold[second.id][0]}.", "p2", question=second.id), Rollout("x", "p3")]
    trials = [Trial(Edit(("parent",), r), one.lineage.root.derive(i)) for i, r in enumerate(rollouts)]
    [(parent, pair)] = updater.pairs(trials, [], one.run)
    assert (parent, pair.prompt, pair.chosen, pair.rejected) == ("parent", "p1", f"It is {gold[first.id][0]}.", "no idea")


class TestSPIN(UpdaterContract):
    def make_plugin(self) -> Any:
        pytest.importorskip("trl")
        return SPIN(dict(SELF_PLAY))

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles(rewarder=Verifier()).items() if r != "updater"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, updater=self.make_plugin(), rewarder=Verifier())


def test_a_game_that_is_none_is_refused() -> None:
    pytest.importorskip("trl")
    with pytest.raises(ConfigError, match="needs the field"):
        SPIN(SELF_PLAY, answer="yes")
    with pytest.raises(ConfigError, match="previous policy"):
        SPIN(SELF_PLAY, reference="root")


# ---- STaR ----


def self_taught(folder: Path, hint: str | None) -> tuple[list[tuple[str, Any]], list[str], Session]:
    """What is learnt of two questions, the first of which is answered rightly without a hint; what was asked; and the session."""
    asked: list[str] = []

    def script(request: Generate, known: Any) -> str:
        asked.append(request.prompt)
        return f"Since you say so: {request.prompt.rpartition('[')[2].rstrip(']')}"

    one = session(folder, ScriptedEngine(script), updater=(updater := STaR(LORA, keep=1, hint=hint)), rewarder=Verifier())
    one.run.grader = Contains()
    first, second = one.run.task.train[0].questions[:2]
    gold = one.run.task.labels([first, second])
    rollouts = [
        Rollout("no idea", "p1", question=first.id),
        Rollout(f"It is {gold[first.id][0]}.", "p1", question=first.id),
        Rollout("no {answer}", "p2 {answer}", question=second.id),
        Rollout("nor now", "p2 {answer}", question=second.id),
    ]
    root = one.lineage.root
    trials = [Trial(Edit((root.id,), r, r.question), root.derive(i)) for i, r in enumerate(rollouts)]
    rewards = [Evaluation(0.0), Evaluation(1.0), Evaluation(0.0), Evaluation(0.0)]
    with one.run.stage("update", 1):
        return updater.taught(trials, rewards, one.lineage, one.run), asked, one


def test_what_was_answered_with_a_hint_is_learnt_without_it(tmp_path: Path) -> None:
    found, asked, one = self_taught(tmp_path, "{prompt} [{answer}]")
    first, second = one.run.task.train[0].questions[:2]
    gold = one.run.task.labels([first, second])
    answer = gold[second.id][0]
    assert asked == [f"p2 {{answer}} [{answer}]"], "only the question that nobody answered is asked again, and its prompt is no template"
    assert [(d.prompt, d.text) for _, d in found] == [("p1", f"It is {gold[first.id][0]}."), ("p2 {answer}", f"Since you say so: {answer}")]


def test_a_rationalisation_that_ends_wrongly_is_not_learnt(tmp_path: Path) -> None:
    found, asked, _ = self_taught(tmp_path, "{prompt} {answer} [never mind")
    assert len(asked) == 1
    assert [d.prompt for _, d in found] == ["p1"]


def test_without_a_hint_no_label_is_read(tmp_path: Path) -> None:
    found, asked, _ = self_taught(tmp_path, None)
    assert asked == []
    assert [d.prompt for _, d in found] == ["p1"]
    assert (STaR(LORA).uses_labels, STaR(LORA, hint=None).uses_labels) == (True, False)


class TestSTaR(UpdaterContract):
    def make_plugin(self) -> Any:
        return STaR(dict(LORA), hint="{prompt} ({answer})")

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles(rewarder=Verifier()).items() if r != "updater"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, updater=self.make_plugin(), rewarder=Verifier())


def test_a_hint_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the field {answer}"):
        STaR(LORA, hint="{prompt}")


# ---- strategies ----

SETTINGS: dict[str, dict[str, Any]] = {
    "intuitor": {"updater.algorithm": "grpo", "updater.beta": 0.005, "updater.kl": "loss", "editor.samples": 8},
    "em_rl_token": {"updater.algorithm": "rloo", "updater.beta": 0.001, "updater.kl": "loss", "editor.samples": 4},
    "em_rl_sequence": {"updater.algorithm": "rloo", "updater.beta": 0.001, "updater.kl": "loss", "editor.samples": 4},
    "em_ft": {"updater._target_": "selfimprove_label_free.EntropyMinimisation"},
    "self_rewarding": {
        "editor.samples": 4,
        "editor.asking.temperature": 0.7,
        "editor.asking.top_p": 0.9,
        "rewarder.samples": 3,
        "updater._target_": "selfimprove.finetuning.DPO",
        "updater.beta": 0.1,
        "updater.lora.batch": 16,
    },
    "star": {
        "editor.prompts": 0,
        "editor.samples": 1,
        "editor.asking.temperature": 0.0,
        "updater.restart": True,
        "updater.keep": 1,
        "updater.lora.batch": 8,
        "updater.hint": "{prompt}\n({answer})",
    },
    "rest_em": {"editor.samples": 32, "editor.asking.temperature": 0.7, "updater.restart": True, "updater.keep": 10},
    "spin": {"updater.beta": 0.1, "updater.lora.epochs": 2, "updater.reference": "previous"},
}
"""What the papers set, by strategy."""


@pytest.mark.parametrize("strategy", SETTINGS)
def test_a_strategy_has_the_settings_of_its_paper(strategy: str) -> None:
    written = flat(config.compose([f"strategy={strategy}"]).values)
    assert SETTINGS[strategy].items() <= written.items()


@pytest.mark.parametrize("strategy", SETTINGS)
def test_a_strategy_runs_on_the_scripted_model(
    strategy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["task=toy", "engine=toy", "grader=exact", "guard=[rounds]", "guard.rounds.rounds=1", "editor.prompts=2", "run.folder=run"]
    code = main(["run", f"strategy={strategy}", *small])
    assert code == 0, capsys.readouterr().err
    assert main(["show", "run"]) == 0


def test_credit_sums_to_the_reward(tmp_path: Path) -> None:
    one = session(tmp_path)
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    trials = one.hook.apply(edits=edits, lineage=one.lineage, run=one.run)
    for trial, reward in zip(trials, one.hook.reward(trials=trials, lineage=one.lineage, run=one.run), strict=True):
        assert len(reward.credit) == len(trial.edit.payload.ids)
        assert math.fsum(reward.credit) == pytest.approx(reward.score)
