"""Every strategy on the embedded model, by the commands that a user types."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfimprove import journal, runfolder
from selfimprove.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning"),  # of numba, which pyribs brings
]
SMALL = ["task.train=8", "task.validation=2", "task.test=2", "observer=[]", "guard.rounds.rounds=2", "rewarder.prompts=2"]
LIKELY = ["rewarder=answer_likelihood", "evaluator=none"]
RUNS = {
    "eggroll": ["editor.population=4", *LIKELY, "updater.ascent.momentum=0.9"],
    "es": ["editor.population=2", *LIKELY, "updater.ascent.optimizer=adam"],
    "cma_merge": ["editor.population=4", *LIKELY],
    "map_elites": ["editor.population=3", "selector.parents=2", "rewarder.asking.max_tokens=6"],
}


@pytest.mark.parametrize("strategy", RUNS)
def test_a_strategy_on_the_embedded_model(strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["run", f"strategy={strategy}", *RUNS[strategy], *SMALL, f"run.folder={folder}"]) == 0, capsys.readouterr().err
    lineage, _, _ = journal.read(folder / "journal.jsonl")
    assert [len(r.children) for r in lineage.rounds] == ([3, 3] if strategy == "map_elites" else [1, 1])
    assert all(e.score is not None for r in lineage.rounds for e in r.rewards)
    assert main(["show", str(folder)]) == 0
    before = journal.lineage_digest(folder / "journal.jsonl")
    assert main(["resume", str(folder)]) == 0
    assert journal.lineage_digest(folder / "journal.jsonl") == before
    if strategy == "eggroll":
        exported(folder, tmp_path / "exported")


def test_adapters_of_different_strategies_and_seeds_are_merged_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    section = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").partition("## Merging")[2]
    commands = [line.split() for line in re.findall(r"^selfimprove (.+)$", section, flags=re.MULTILINE)]
    assert len(commands) == 6
    tiny = ["task.train=8", "task.validation=2", "task.test=2", "observer=[]", "guard=[rounds]", "guard.rounds.rounds=1", "evaluator=none"]
    others = [*tiny, "middleware=[]", "editor.prompts=2", "editor.samples=2"]
    merge = [*tiny, "editor.population=4", "rewarder=answer_likelihood", "rewarder.prompts=2"]
    for command in commands:
        small = [] if command[0] == "export" else merge if "strategy=cma_merge" in command else others
        assert main([*command, *small]) == 0, capsys.readouterr().err
    settings = json.loads(Path("adapters", "merge", "adapter_config.json").read_text())
    assert settings["r"] == 2 * json.loads(Path("adapters", "em_rl", "adapter_config.json").read_text())["r"]


def exported(folder: Path, destination: Path) -> None:
    """What is written for transformers is the policy that the run has."""
    assert main(["export", str(folder), "latest", str(destination)]) == 0
    written = load_file(destination / "model.safetensors")
    _, session = runfolder.opened(folder, only_measure=True, trust_env=False)
    try:
        latest, root = (c.parts["policy"] for c in (session.lineage.latest, session.lineage.root))
        with session.run.models.open(root) as model:
            original = {n: w.clone() for n, w in model.state_dict().items()}
        moved = session.run.models.adapter(latest.digest)
        for name, added in moved.items():
            assert torch.equal(written[name], original[name] + added.to(original[name].dtype))
        assert len(moved) == 7 * json.loads((destination / "config.json").read_text())["num_hidden_layers"]
    finally:
        session.close()
    assert main(["export", str(folder), "latest", str(destination.with_name("adapter")), "--adapter"]) == 2
