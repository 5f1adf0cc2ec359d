"""What the base model votes before a run: labels that stay, the easiest questions, gold labels for a share, sealed questions without answers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from selfimprove.cli import main
from selfimprove.errors import AdmissionError, ConfigError, SealedError
from selfimprove.graders import Exact
from selfimprove.journal import lineage_digest
from selfimprove.models import Lora
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.rewarders import Verifier
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.session import Session
from selfimprove.testing import EditorContract, RewarderContract, ToyTask, digest_after_kill, kill_points, toy_session
from selfimprove_srt import EasiestRollouts, GoldMixed, MajorityVote, OfflineMajority

ASKING: Any = {"template": "{context}\n{question}", "max_tokens": 16}


def roles(**changes: Any) -> dict[str, Any]:
    updater = PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1))
    return {"editor": Rollouts(ASKING, 2, 4), "rewarder": MajorityVote(), "updater": updater, "evaluator": PassAtK(2), **changes}


def session(folder: Path, **changes: Any) -> Session:
    return toy_session(folder, grader=Exact(), **roles(**changes))


class TestOfflineContract(RewarderContract):
    def make_plugin(self) -> Any:
        return OfflineMajority(4)

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles().items() if r != "rewarder"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, rewarder=self.make_plugin())


class TestGoldContract(TestOfflineContract):
    def make_plugin(self) -> Any:
        return GoldMixed(MajorityVote(), 0.5)


class TestEasiestContract(EditorContract):
    def make_plugin(self) -> Any:
        return EasiestRollouts(ASKING, 2, 2, easiest=0.5, votes=3)

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles().items() if r != "editor"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, editor=self.make_plugin())


def test_labels_are_voted_once_and_stay(tmp_path: Path) -> None:
    one = session(tmp_path, rewarder=OfflineMajority(4))
    before = one.run.blobs.read(one.lineage.root.parts["votes"])
    assert one.run.ledger.totals["generated_tokens"] > 0
    assert before.keys() == {q.id for i in one.run.task.train for q in i.questions}
    lineage = one.improve()
    assert lineage.latest.parts["votes"] == lineage.root.parts["votes"]
    assert one.run.ledger.totals["labels"] == sum(len(i.questions) for i in one.run.task.validation)  # the evaluator's


def test_a_killed_run_votes_the_same(tmp_path: Path) -> None:
    maker = partial(
        toy_session,
        rounds=1,
        grader=Exact(),
        editor=EasiestRollouts(ASKING, 1, 2, votes=2),
        rewarder=OfflineMajority(2),
        updater=PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1)),
        evaluator=PassAtK(1, greedy=False),
    )
    total = kill_points(maker, tmp_path / "whole")
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in sorted({0, 1, total // 3, 2 * total // 3, total - 1}):
        assert digest_after_kill(maker, tmp_path / str(at), at) == whole, f"killed at instant {at} of {total}"


def test_only_the_surest_questions_are_asked(tmp_path: Path) -> None:
    editor = EasiestRollouts(ASKING, 0, 1, easiest=0.5, votes=4)
    one = session(tmp_path, editor=editor)
    votes = one.run.blobs.read(one.lineage.root.parts["votes"])
    asked = {q.id for _, q in editor.questions(one.run, 0, one.lineage.root)}
    assert 0 < len(asked) < len(votes)
    assert min(votes[q]["share"] for q in asked) >= max(v["share"] for q, v in votes.items() if q not in asked)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gold_labels_are_read_for_their_share_only(tmp_path: Path, share: float) -> None:
    one = session(tmp_path, rewarder=GoldMixed(MajorityVote(), share), editor=Rollouts(ASKING, 0, 2))
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    made = one.hook.apply(edits=edits, lineage=one.lineage, run=one.run)
    one.hook.reward(trials=made, lineage=one.lineage, run=one.run)
    questions = {e.payload.question for e in edits}
    gold = [q for q in questions if one.run.rng("gold", q).random() < share]
    assert one.run.ledger.totals["labels"] == len(gold)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OfflineMajority(0), "samples >= 1"),
        (lambda: EasiestRollouts(ASKING, easiest=0.0), "easiest"),
        (lambda: GoldMixed(MajorityVote(), 1.5), "share"),
        (lambda: MajorityVote(keep=0.0), "keep"),
    ],
)
def test_values_that_make_no_sense(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


# ---- sealed questions without their answers ----


def transductive(folder: Path, **changes: Any) -> Session:
    task = ToyTask()
    task.transductive = True  # type: ignore[attr-defined]
    return toy_session(folder, grader=Exact(), task=task, **roles(**changes))


def test_a_transductive_run_trains_on_the_sealed_questions_and_never_sees_an_answer(tmp_path: Path) -> None:
    one = transductive(tmp_path)
    assert {i.id for i in one.run.task.train}.isdisjoint(i.id for i in one.run.task.validation)
    [question, *_] = one.run.task.train[0].questions
    with one.run.task.reading_as("a test", True), pytest.raises(SealedError, match="stays sealed"):
        one.run.task.labels([question])
    one.improve()
    assert json.loads((tmp_path / "identity.json").read_text())["transductive"] is True


def test_every_result_says_transductive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The closing table, `show`, `runs`, `eval` and its file, in a run that a user starts."""
    monkeypatch.chdir(tmp_path)
    small = ["task.train=2", "task.validation=2", "task.test=2", "editor.prompts=2", "editor.samples=4", "evaluator.samples=2", "guard=[rounds]"]
    line = ["run", "strategy=ttrl", "engine=scripted", *small, "guard.rounds.rounds=1", "rewarder.trained=2", "observer=[]", "run.folder=run"]
    for command in (line, ["show", "run"], ["runs", "--root", "."], ["eval", "run"]):
        assert main(command) == 0, capsys.readouterr().err
        assert "transduct" in capsys.readouterr().out, command[0]  # a table may break the word
    assert json.loads((tmp_path / "run" / "test.json").read_text())["transductive"] is True


def test_a_role_that_learns_from_labels_is_refused_there(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="stay sealed"):
        transductive(tmp_path, rewarder=Verifier())


@pytest.mark.parametrize("strategy", ["srt_offline", "srt_easy", "ttrl"])
def test_the_strategies_compose(strategy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"strategy={strategy}", "--cfg", "job"]) == 0
    assert ("transductive: true" in capsys.readouterr().out) is (strategy == "ttrl")
