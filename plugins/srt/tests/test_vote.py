"""The vote by hand, over classes of equivalent answers; the rewarder's contract; the strategy as a user names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from selfimprove import config
from selfimprove.cli import main
from selfimprove.errors import ConfigError
from selfimprove.graders import Exact
from selfimprove.models import Lora
from selfimprove.payloads import Rollout
from selfimprove.policy_gradient import PolicyGradient
from selfimprove.records import Candidate, Edit, Evaluation, Trial
from selfimprove.rollouts import PassAtK, Rollouts
from selfimprove.runfolder import flat
from selfimprove.session import Session
from selfimprove.testing import RewarderContract, toy_session
from selfimprove_srt import MajorityVote, count_votes

ASKING: Any = {"template": "{context}\n{question}", "max_tokens": 16}


def roles(**changes: Any) -> dict[str, Any]:
    updater = PolicyGradient(Lora(1, 1, ("q_proj",), 1.0, 1))
    return {"editor": Rollouts(ASKING, 2, 4), "rewarder": MajorityVote(), "updater": updater, "evaluator": PassAtK(2), **changes}


def session(folder: Path, grader: Any = None, **changes: Any) -> Session:
    return toy_session(folder, grader=grader or Exact(), **roles(**changes))


# ---- the vote ----


def test_a_vote_by_hand() -> None:
    vote = count_votes([3, 1, None, 3])
    assert (vote.winner, vote.share, vote.shares) == (3, 0.5, (0.5, 0.25, 0.0, 0.5))
    assert vote.entropy == pytest.approx(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))


def test_ties_and_silence_have_no_winner() -> None:
    assert count_votes([1, 2, 1, 2]).winner is None
    assert count_votes([None, None]) == count_votes([None] * 2)
    assert count_votes([None, None]).share == count_votes([]).share == 0


@given(st.lists(st.none() | st.integers(0, 3), max_size=12), st.randoms())
def test_a_vote_does_not_depend_on_the_order(classes: list[int | None], chance: Any) -> None:
    order = list(range(len(classes)))
    chance.shuffle(order)
    one, other = count_votes(classes), count_votes([classes[i] for i in order])
    assert (one.winner, one.share) == (other.winner, other.share)
    assert other.shares == tuple(one.shares[i] for i in order)
    assert one.winner is None or classes.count(one.winner) == max(classes.count(c) for c in set(classes) - {None})
    assert 0 <= one.share <= 1


# ---- the rewarder ----


def trials(*texts: str, group: str = "g") -> list[Trial]:
    from selfimprove.records import Candidate

    return [Trial(Edit(("p",), Rollout(t), group), Candidate(f"{group}{i}", {})) for i, t in enumerate(texts)]


def rewarded(folder: Path, rewarder: MajorityVote, given: Sequence[Trial], grader: Any = None) -> Sequence[Evaluation]:
    one = session(folder, rewarder=rewarder, grader=grader)
    return list(one.hook.reward(trials=given, lineage=one.lineage, run=one.run))


def test_equivalent_answers_vote_together(tmp_path: Path) -> None:
    from selfimprove.mathematics import MathGrader

    texts = ["It is 1/2.", "so \\boxed{0.5}", "3", "3 apples? no: the answer is 7", "no idea"]
    assert [r.score for r in rewarded(tmp_path, MajorityVote(), trials(*texts), MathGrader())] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_groups_vote_apart(tmp_path: Path) -> None:
    given = [*trials("a", "a", "b"), *trials("b", "b", "a", group="h")]
    assert [r.score for r in rewarded(tmp_path, MajorityVote(), given)] == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("rewarder", "texts", "reason"),
    [
        (MajorityVote(), ("a", "b"), "tied"),
        (MajorityVote(), ("", " "), "no rollout"),
        (MajorityVote(0.7), ("a", "a", "b"), "below the threshold"),
    ],
)
def test_a_question_abstains(tmp_path: Path, rewarder: MajorityVote, texts: tuple[str, ...], reason: str) -> None:
    found = rewarded(tmp_path, rewarder, trials(*texts))
    assert all(r.score is None and r.error and reason in r.error for r in found)
    assert all({"share", "entropy"} == r.metrics.keys() for r in found)


def test_soft_rewards_are_shares(tmp_path: Path) -> None:
    assert [r.score for r in rewarded(tmp_path, MajorityVote(soft=True), trials("a", "b", "a", ""))] == [0.5, 0.25, 0.5, 0.0]
    assert [r.score for r in rewarded(tmp_path / "tie", MajorityVote(soft=True), trials("a", "b"))] == [0.5, 0.5]


def test_the_surest_questions_are_kept(tmp_path: Path) -> None:
    given = [*trials("a", "b", "c"), *trials("a", "a", "b", group="h")]
    found = rewarded(tmp_path, MajorityVote(keep=0.5), given)
    assert [r.score for r in found] == [None, None, None, 1, 1, 0]
    assert found[0].error == "other questions of the round have larger majorities"


def test_a_text_that_was_cut_has_no_answer(tmp_path: Path) -> None:
    given = trials("4", "9", "4")
    cut = [Trial(Edit(("p",), Rollout("9", finished=False), "g"), Candidate(f"cut{i}", {})) for i in range(5)]
    assert [r.score for r in rewarded(tmp_path, MajorityVote(), [*given, *cut])] == [1, 0, 1, 0, 0, 0, 0, 0]


def test_some_rollouts_only_vote(tmp_path: Path) -> None:
    found = rewarded(tmp_path, MajorityVote(trained=2), trials("b", "a", "a", "a"))
    assert [r.score for r in found] == [0, 1, None, None]


class TestContract(RewarderContract):
    def make_plugin(self) -> Any:
        return MajorityVote()

    def make_roles(self) -> dict[str, Any]:
        return {r: p for r, p in roles().items() if r != "rewarder"}

    def make_session(self, folder: Path) -> Session:
        return session(folder, rewarder=self.make_plugin())


class TestSoftContract(TestContract):
    def make_plugin(self) -> Any:
        return MajorityVote(0.3, soft=True)


def test_no_label_is_read_for_a_reward(tmp_path: Path) -> None:
    one = session(tmp_path)
    edits = one.hook.propose(parents=[one.lineage.root], lineage=one.lineage, run=one.run)
    made = one.hook.apply(edits=edits, lineage=one.lineage, run=one.run)
    one.hook.reward(trials=made, lineage=one.lineage, run=one.run)
    assert one.run.ledger.totals["labels"] == 0


def test_a_grader_that_cannot_tell_equal_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="grader=math"):
        toy_session(tmp_path, **roles())  # the toy grader cannot


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        MajorityVote(threshold)


PAPERS: dict[str, dict[str, Any]] = {
    "srt_paper": {
        "editor.prompts": 16,
        "editor.samples": 32,
        "editor.asking.temperature": 1.0,
        "editor.asking.max_tokens": 3072,
        "updater.algorithm": "rloo",
        "updater.beta": 0.001,
        "updater.kl": "reward",
        "updater.reference": "root",
    },
    "ttrl": {
        "editor.prompts": 8,
        "editor.samples": 64,
        "editor.asking.temperature": 1.0,
        "rewarder.trained": 32,
        "updater.algorithm": "grpo",
        "updater.lora.batch": 32,
        "task.transductive": True,
    },
    "srt_easy": {"editor.easiest": 0.3333},
}
"""What the papers set, by strategy."""


@pytest.mark.parametrize("strategy", PAPERS)
def test_a_strategy_has_the_settings_of_its_paper(strategy: str) -> None:
    written = flat(config.compose([f"strategy={strategy}"]).values)
    assert PAPERS[strategy].items() <= written.items()


def test_the_strategy_composes(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy=srt", "rewarder.threshold=0.6", "--cfg", "job"]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["rewarder"] == {"_target_": "selfimprove_srt.MajorityVote", "threshold": 0.6, "soft": False, "keep": 1.0, "trained": 0}
    assert found["updater"]["algorithm"] == "rloo"
    assert found["task"]["family"] == "products"
