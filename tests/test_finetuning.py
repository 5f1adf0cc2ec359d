"""What SFT keeps and DPO pairs, by hand and by law; their contracts; that both learn with the scripted model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfimprove.errors import ConfigError
from selfimprove.finetuning import DPO, SFT
from selfimprove.graders import Exact
from selfimprove.hooks import hookimpl
from selfimprove.models import Document, Models, Train
from selfimprove.payloads import Rollout
from selfimprove.records import Candidate, Edit, Evaluation, Trial
from selfimprove.rewarders import Verifier
from selfimprove.rollouts import Asking, PassAtK, Rollouts
from selfimprove.testing import UpdaterContract, toy_session

pytest.importorskip("trl")

LORA: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 1, "trainer": "trl"}


class Longer:
    """The number of letters of a rollout."""

    consumes = (Rollout,)

    @hookimpl
    def reward(self, trials: Sequence[Trial]) -> Sequence[Evaluation]:
        return [Evaluation(float(len(t.edit.payload.text) + i % 2)) for i, t in enumerate(trials)]


def roles(**changes: Any) -> dict[str, Any]:
    editor = Rollouts(Asking(template="{context}\n{question}", max_tokens=64), prompts=2, samples=3)
    return {"editor": editor, "rewarder": Longer(), "evaluator": PassAtK(2), **changes}


def trial(text: str, group: str = "g", **changes: Any) -> Trial:
    return Trial(Edit(("p",), Rollout(text, f"prompt of {group}", **changes), group), Candidate(f"{group}/{text}", {}))


def judged(*rows: tuple[str, float | None], group: str = "g") -> tuple[list[Trial], list[Evaluation]]:
    return [trial(t, group) for t, _ in rows], [Evaluation.failed("?") if s is None else Evaluation(s) for _, s in rows]


def texts(trials: Sequence[Trial]) -> list[str]:
    return [t.edit.payload.text for t in trials]


# ---- SFT ----


def test_what_is_kept_by_hand() -> None:
    given = judged(("wrong", 0.0), ("right", 1.0), ("right", 1.0), ("half", 0.5), ("better", 2.0), ("?", None), ("", 3.0))
    assert texts(SFT(LORA).kept(*given)) == ["better", "right"]
    assert texts(SFT(LORA, keep=1).kept(*given)) == ["better"]
    assert texts(SFT(LORA, threshold=0.0).kept(*given)) == ["better", "right", "half"]


def test_a_rollout_that_was_cut_is_no_example() -> None:
    cut, whole = trial("cut", finished=False), trial("whole")
    assert texts(SFT(LORA).kept([cut, whole], [Evaluation(1.0)] * 2)) == ["whole"]
    assert DPO(LORA).pairs([cut, whole], [Evaluation(1.0), Evaluation(0.0)], None) == []  # type: ignore[arg-type]


ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d"]), st.none() | st.floats(-1, 1, allow_subnormal=False)), max_size=8)


@given(ROWS, st.integers(0, 3), st.floats(-1, 1, allow_subnormal=False))
def test_what_is_kept_exceeds_the_threshold_and_nothing_better_is_left_out(rows: list[tuple[str, float | None]], keep: int, threshold: float) -> None:
    trials, rewards = judged(*rows)
    score = {id(t): r.score for t, r in zip(trials, rewards, strict=True)}
    kept = SFT(LORA, threshold, keep).kept(trials, rewards)
    scores = [score[id(t)] for t in kept]
    assert all(s is not None and s > threshold for s in scores)
    assert len(set(texts(kept))) == len(kept) <= (keep or len(rows))
    best: dict[str, float] = {}
    for text, s in rows:
        if s is not None and s > threshold:
            best[text] = max(s, best.get(text, s))
    assert scores == sorted(best.values(), reverse=True)[: keep or None]


@pytest.mark.parametrize("restart", [False, True])
def test_a_restart_trains_the_root_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    asked: list[Train] = []
    train = Models.train
    monkeypatch.setattr(Models, "train", lambda self, requests: asked.extend(requests) or train(self, requests))
    lineage = toy_session(tmp_path, rounds=2, **roles(updater=SFT(LORA, restart=restart))).improve()
    first, second = (lineage.round(i).children[0] for i in (0, 1))
    root = lineage.root.parts["policy"]
    assert [r.policy for r in asked] == [root, root if restart else first.parts["policy"]]
    assert second.parents == (first.id,)
    assert all(r.lora.merge and r.lora.trainer == "trl" for r in asked)


def test_on_right_answers_the_policy_improves(tmp_path: Path) -> None:
    """The scripted model answers a question whose gold text it has been trained on; it reads it in the context at first."""
    made = toy_session(tmp_path, rounds=1, grader=Exact(), **roles(updater=SFT(LORA, restart=True), rewarder=Verifier()))
    lineage = made.improve()
    with made.run.models.open(lineage.latest.parts["policy"]) as model:
        assert len(model.known) == 2
        assert all(isinstance(d, Document) and d.prompt for d in model.known)


# ---- DPO ----


def test_pairs_by_hand() -> None:
    one, other = judged(("worst", -1.0), ("middling", 0.0), ("best", 1.0)), judged(("same", 1.0), ("also", 1.0), group="h")
    trials, rewards = one[0] + other[0], one[1] + other[1]
    [(parent, pair)] = DPO(LORA).pairs(trials, rewards, None)  # type: ignore[arg-type]
    assert (parent, pair.prompt, pair.chosen, pair.rejected) == ("p", "prompt of g", "best", "worst")
    assert DPO(LORA, margin=2.0).pairs(trials, rewards, None) == []  # type: ignore[arg-type]


@given(ROWS)
def test_a_pair_is_the_best_and_the_worst(rows: list[tuple[str, float | None]]) -> None:
    trials, rewards = judged(*rows)
    scores = [s for _, s in rows if s is not None]
    for _, pair in DPO(LORA).pairs(trials, rewards, None):  # type: ignore[arg-type]
        assert (pair.chosen, max(scores)) in rows
        assert (pair.rejected, min(scores)) in rows
        assert pair.chosen != pair.rejected


# ---- contracts and settings ----


class TestSFT(UpdaterContract):
    def make_plugin(self) -> Any:
        return SFT(dict(LORA), keep=2)

    def make_roles(self) -> dict[str, Any]:
        return roles()


class TestDPO(UpdaterContract):
    def make_plugin(self) -> Any:
        return DPO(dict(LORA), reference="root")

    def make_roles(self) -> dict[str, Any]:
        return roles()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFT(LORA, keep=-1), "at least 0"),
        (lambda: SFT({"rank": 1}), "does not fit"),
        (lambda: DPO(LORA, reference="ema"), "previous or root"),
        (lambda: DPO(LORA, margin=-1.0), "at least 0"),
        (lambda: DPO(LORA, beta=0.0), "beta > 0"),
        (lambda: DPO({**LORA, "trainer": "bank"}), "lora.trainer=trl"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
