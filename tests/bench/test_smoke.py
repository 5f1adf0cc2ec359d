"""The smoke suite from beginning to end, killed on the way, and its report in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfimprove.bench.opening import openings
from selfimprove.cli import main

pytestmark = pytest.mark.slow
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
WORDS = ["bench", "suite=smoke", "seeds=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke benchmark that was killed after its second cell and gone on with."""
    out = tmp_path_factory.mktemp("bench")
    words = [*WORDS, "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "selfimprove.cli", *words], stdout=subprocess.DEVNULL)
    while sum(1 for _ in out.glob("cells/*.json")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in out.glob("cells/*.json")}
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(words) == 0
    assert "sealed test: 16 of 16 cells are measured" in told.getvalue()
    assert all(p.stat().st_mtime_ns == at for p, at in done.items()), "finished cells are not run again"
    return out


def test_every_cell_is_measured_on_the_test_once(folder: Path) -> None:
    found = json.loads((folder / "result.json").read_text())
    assert not found["failures"]
    assert not found["left_out"]
    [opened] = openings(folder)
    assert len(opened["cells"]) == 16
    assert not opened["peeked"]
    assert all(c["score"] is not None and c["per_item"] for a in found["arms"] for c in a["cells"])


def test_questions_of_different_seeds_are_different_items(folder: Path) -> None:
    found = json.loads((folder / "result.json").read_text())
    one, other = ({tuple(c["per_item"]) for c in a["cells"]} for a in found["arms"][:2])
    assert one == other
    assert len(one) == 2
    [c] = [c for c in found["comparisons"] if c["other"] == "random_edits"]
    assert c["items"] == sum(map(len, one))


def test_trained_arms_spent_the_same_and_null_arms_are_beaten(folder: Path) -> None:
    found = json.loads((folder / "result.json").read_text())
    arms = {a["name"]: a for a in found["arms"]}
    assert arms["toy"]["score"] > arms["greedy"]["score"]
    assert arms["toy"]["spent"] >= found["budgets"]["toy"]
    assert {c["other"] for c in found["comparisons"]} == set(arms) - {"toy"}


def test_the_same_command_again_changes_nothing(folder: Path) -> None:
    before = (folder / "result.json").read_bytes()
    assert main([*WORDS, "--out", str(folder)]) == 0
    assert (folder / "result.json").read_bytes() == before
    assert len(openings(folder)) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_its_window(folder: Path, width: int, scheme: int, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    picture = tmp_path / "report.png"
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},2000",
        f"--screenshot={picture}",
        f"file://{folder / 'report.html'}",
    ]
    subprocess.run([CHROMIUM, *words], check=True, timeout=120, capture_output=True)
    assert picture.stat().st_size > 10_000


TINY = """
tasks:
  arithmetic:
    overrides: [task=arithmetic, grader=math, task.train=4, task.validation=2, task.test=3, "task.seed={seed}"]
    untouched: [evaluator.most=4, evaluator.samples=2]
    supervised: [editor.prompts=4, evaluator.samples=2]
arms:
  policy_gradient:
    - strategy=intuitor
    - rewarder=verifier
    - middleware=[]
    - editor.prompts=2
    - editor.samples=4
    - evaluator.samples=2
nulls: [best_of_n, random_edits, supervised]
seeds: 1
budget: {flops: 1.0e+11}
"""


def test_the_embedded_model_is_compared_at_a_tiny_size(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    assert main(["bench", f"suite={tmp_path / 'tiny.yaml'}", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {a["name"] for a in found["arms"]} == {"policy_gradient", "best_of_n", "random_edits", "supervised"}
    assert all(c["score"] is not None and c["spent"]["flops"] > 0 for a in found["arms"] for c in a["cells"])
    assert {c["verdict"] for c in found["comparisons"]} <= {"missing", "invalid"}, "one seed is no comparison"


def test_seeds_of_several_machines_are_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith(("selfimprove bench arms=[toy]", "selfimprove bench --merge"))]
    assert len(commands) == 3
    assert [main(words) for words in commands] == [0, 0, 0]
    found = json.loads((tmp_path / "runs" / "bench" / "both" / "result.json").read_text())
    assert found["seeds"] == [0, 1]
    assert [len(p["openings"]) for p in found["pieces"]] == [1, 1]
    [compared] = found["comparisons"]
    assert compared["seeds"] == 2
