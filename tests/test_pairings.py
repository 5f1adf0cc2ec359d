"""The table of role pairings is what the options do today; what it refuses is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfimprove import pairings
from selfimprove.cli import main
from selfimprove.errors import ConfigError
from selfimprove.sandbox import Sandbox

DOCUMENT = Path(__file__).parents[1] / "docs" / "pairings.md"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it runs nearly two thousand pairs
def test_the_table_is_current() -> None:
    plugins = (f"selfimprove_{name}" for name in ("seal", "srt", "label_free", "evolution", "dgm", "prompt_evolution"))
    for package in (*plugins, "trl"):
        pytest.importorskip(package)
    try:
        Sandbox("auto")
    except ConfigError:
        pytest.skip("no sandbox works on this machine")
    assert DOCUMENT.read_text(encoding="utf-8") == pairings.document(), "write it again: python -m selfimprove.pairings > docs/pairings.md"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("strategy=seal rewarder=self_certainty", "SelfEdits (editor) produces SelfEdit, but SelfCertainty (rewarder) consumes Rollout"),
        ("strategy=seal updater=policy_gradient", "SelfEdits (editor) produces SelfEdit, but PolicyGradient (updater) consumes Rollout"),
        ("strategy=seal rewarder=chance", "Chance (rewarder) gives none"),
        ("strategy=srt rewarder=accuracy", "Rollouts (editor) produces Rollout, but Accuracy (rewarder) consumes SelfEdit"),
        ("strategy=srt updater=restem", "Rollouts (editor) produces Rollout, but ReSTEM (updater) consumes SelfEdit"),
        ("strategy=srt evaluator=seal", "Rollouts (editor) has none; choose `editor=seal`"),
        ("strategy=srt rewarder=prompt_evolution", "Rollouts (editor) produces Rollout, but Gain (rewarder) consumes Instruction"),
        ("strategy=map_elites updater=mixture_mean", "choose editor=cma_merge"),
        ("strategy=seal updater=best_of_group", "add +editor.inner.lora.merge=true"),
        ("strategy=seal evaluator=pass_at_k", "these ask no questions; choose editor=rollouts"),
        ("strategy=srt updater.credit=own", "MajorityVote (rewarder) gives none"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    line: str, reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *line.split(), "task=toy", "engine=toy", "grader=exact"]) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
