"""Several processes, started as a user starts them, take the steps that one takes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfimprove.cli import main
from selfimprove.errors import ConfigError
from selfimprove.models import processes
from selfimprove.models.layer import MOMENTS
from selfimprove.runfolder import opened
from selfimprove.testing import ScriptedEngine

pytest.importorskip("trl")

LINE = (
    *("strategy=srt", "rewarder=chance", "updater=trl_grpo", "evaluator=none", "middleware=[]", "task=toy", "grader=exact", "model=hf"),
    *("engine.dtype=float64", "engine.threads=1", "observer=[]", "guard=[rounds]", "guard.rounds.rounds=2", "editor.prompts=4", "editor.samples=4"),
    *("editor.asking.max_tokens=6", "updater.beta=0.1", "updater.lora.rank=4", "updater.lora.batch=3", "updater.lora.epochs=2"),
    "updater.lora.learning_rate=0.01",
)
"""Two rounds of steps of at most 3 rollouts, of which the last has fewer: two processes share them unequally."""


def launched(line: list[str], count: int, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m", "selfimprove.cli", *line]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl and peft
def test_two_processes_make_the_policies_of_one(tiny: Path, tmp_path: Path) -> None:
    """Weights and moments, of the first round to 1e-5; and a resume in two processes finds nothing left to do.

    How far a prompt is padded depends on what else is in the batch, and rotary embeddings are float32: so much differs, and Adam lets it grow.
    In the second round the first moment, a mean of gradients that cancel, has grown apart by 1.5e-4 on a processor without AVX-512, and weights by
    3e-5: less is asked of them.
    """
    line = ["run", *LINE, f"model.name={tiny}"]
    assert main([*line, f"run.folder={tmp_path / 'one'}"]) == 0
    done = launched([*line, f"run.folder={tmp_path / 'two'}"], 2, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder") == 1, "the others say nothing"
    found = []
    for name in ("one", "two"):
        _, session = opened(tmp_path / name)
        models, (_, *children) = session.run.models, session.lineage
        found.append([{**models.adapter(c.parts["policy"].digest), **models.moments(c.parts["policy.optimizer"])} for c in children])
        session.close()
    assert len(found[0]) == len(found[1]) == 2
    for weights, moments, one, two in zip((1e-5, 1e-4), (1e-5, 1e-3), *found, strict=True):
        assert one.keys() == two.keys()
        assert all((two[n] - w).norm() <= (moments if n.startswith(MOMENTS) else weights) * w.norm() for n, w in one.items())
    again = launched(["resume", str(tmp_path / "two")], 2, tmp_path)
    assert again.returncode == 0, again.stderr


def test_an_engine_that_computes_in_one_process_is_refused_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    with processes.led(ScriptedEngine()) as here:
        assert here
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert processes.leads()
    with pytest.raises(ConfigError, match=r"computes in one process, and 2 were started"), processes.led(ScriptedEngine()):
        pass
