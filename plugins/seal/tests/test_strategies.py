"""The strategies as a user names them; and whole toy runs, repeated and killed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from selfimprove.cli import main
from selfimprove.journal import lineage_digest
from selfimprove.models import Lora
from selfimprove.testing import digest_after_kill, kill_points, toy_session
from selfimprove_seal import Accuracy, ClosedBook, InnerLoop, ReSTEM, SelfEdits

STRATEGIES = ("seal", "seal_paper", "seal_tools")


def printed(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    assert main(["run", *overrides, "--cfg", "job"]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    found: dict[str, Any] = yaml.safe_load(out)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_composes(strategy: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = printed(capsys, f"strategy={strategy}")
    assert {r: found[r]["_target_"].split(".")[0] for r in ("editor", "updater", "evaluator")} == dict.fromkeys(
        ("editor", "updater", "evaluator"), "selfimprove_seal"
    )
    assert list(tmp_path.iterdir()) == [], "it starts nothing"


def test_the_papers_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """SEAL, section 3.1, appendix B and the published code."""
    found = printed(capsys, "strategy=seal_paper")
    editor, updater = found["editor"], found["updater"]
    assert (editor["contexts"], editor["edits"], editor["temperature"], editor["top_p"]) == (50, 5, 1.0, 0.95)
    assert (editor["inner"]["replicates"], editor["inner"]["passage"], editor["inner"]["pairs"]) == (3, True, "text")
    lora = editor["inner"]["lora"]
    assert (lora["rank"], lora["alpha"], lora["targets"]) == (32, 64, ["q_proj", "v_proj"])
    assert (lora["learning_rate"], lora["epochs"], lora["batch"]) == (1e-3, 10, 1)
    assert (updater["keep"], updater["restart"], updater["lines"], updater["threshold"]) == (1, False, False, None)
    assert (updater["lora"]["rank"], updater["lora"]["alpha"]) == (64, 128)
    assert (updater["lora"]["learning_rate"], updater["lora"]["epochs"], updater["lora"]["batch"]) == (3e-4, 2, 10)
    assert len(updater["lora"]["targets"]) == 7
    assert found["rewarder"]["_target_"] == "selfimprove_seal.Accuracy"


@pytest.mark.parametrize(
    "override", ["editor.prompt_name=few_shots", "editor.inner.pairs=x", "updater.keep=0", "evaluator.arms=[x]", "editor.edits=0"]
)
def test_a_value_that_makes_no_sense_is_one_message(
    override: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "strategy=seal", "task=toy", "engine=toy", override]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert override.split("=")[0].split(".")[-1].replace("prompt_name", "edit prompt") in err


def restem() -> ReSTEM:
    return ReSTEM(Lora(1, 1, ("q_proj",), 1.0, 1, merge=True))


def session(folder: Path) -> Any:
    lora: dict[str, Any] = {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2}
    inner = InnerLoop(lora, question="Question: {question} Answer:", replicates=2)
    editor = SelfEdits(inner=inner, contexts=2, edits=2, max_tokens=64)
    evaluator = ClosedBook(arms=("untouched", "passage_equal_tokens"))
    return toy_session(folder, rounds=2, editor=editor, rewarder=Accuracy(), updater=restem(), evaluator=evaluator)


def test_a_toy_run_learns_to_write(tmp_path: Path) -> None:
    """The scripted model writes better after it was trained on its own texts, and SEAL finds that."""
    lineage = session(tmp_path).improve()
    root, last = lineage.score(lineage.root.id), lineage.score(lineage.latest.id)
    assert root is not None
    assert last is not None
    assert last >= root


def inner_settings() -> dict[str, Any]:
    return {
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"], "learning_rate": 1.0, "epochs": 2},
        "question": "Question: {question} Answer:",
        "replicates": 2,
    }


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    maker = partial(
        toy_session,
        rounds=1,
        editor=SelfEdits(inner=inner_settings(), contexts=1, edits=2, max_tokens=64),  # type: ignore[arg-type]
        rewarder=Accuracy(),
        updater=restem(),
        evaluator=ClosedBook(arms=("untouched",)),
    )
    total = kill_points(maker, tmp_path / "whole")
    whole = lineage_digest(tmp_path / "whole" / "journal.jsonl")
    for at in sorted({0, 1, total // 3, total // 2, total - 2, total - 1}):
        assert digest_after_kill(maker, tmp_path / str(at), at) == whole, f"killed at instant {at} of {total}"
