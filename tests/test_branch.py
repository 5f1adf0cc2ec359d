from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfimprove import journal, past
from selfimprove.branch import replay
from selfimprove.cli import main
from selfimprove.errors import ConfigError


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    assert main(["run", "strategy=toy", "guard.rounds.rounds=3", "observer=[]", f"run.folder={folder}"]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.parts[-1] != ".lock"}


def test_a_fork_with_nothing_changed_is_the_run_that_it_came_from(recorded: Path, tmp_path: Path) -> None:
    before = files(recorded)
    new = tmp_path / "same"
    assert main(["fork", str(recorded), "--round", "1", f"run.folder={new}"]) == 0
    assert journal.lineage_digest(new / "journal.jsonl") == journal.lineage_digest(recorded / "journal.jsonl")
    assert files(recorded) == before
    assert json.loads((new / "forked.json").read_text())["round"] == 1


def test_a_fork_goes_on_with_what_was_changed_and_can_be_resumed(recorded: Path, tmp_path: Path) -> None:
    new = tmp_path / "other"
    words = ["updater=fine_tune", "guard.rounds.rounds=2", f"run.folder={new}"]
    assert main(["fork", str(recorded), "--round", "1", *words]) == 2, "an editor that asks nothing cannot be fine-tuned"
    new = tmp_path / "another"
    words = ["rewarder=accept", "guard.rounds.rounds=4", f"run.folder={new}"]
    assert main(["fork", str(recorded), "--round", "2", *words]) == 0
    old, young = (journal.read(f / "journal.jsonl")[0] for f in (recorded, new))
    assert young.rounds[:2] == old.rounds[:2]
    assert len(young) == 4
    assert {e.score for e in young.round(-1).rewards} == {1.0}
    assert main(["resume", str(new)]) == 0
    assert past.row(new)["rewarder.probability"] == 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--round", "9"], "--round wants"),
        (["--round", "-1"], "--round wants"),
        (["--round", "1", "seed=4"], "rest on the run's seed"),
        (["--round", "1", "strategy=toy"], "rest on the run's strategy"),
        (["--round", "1", "rewarder=acept"], "did you mean accept"),
        (["--round", "1", "editor.edit=4"], "did you mean editor.edits"),
    ],
)
def test_a_fork_that_cannot_be_is_refused(words: list[str], message: str, recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fork", str(recorded), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_whose_test_was_opened_has_no_branch(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = tmp_path / "opened"
    shutil.copytree(recorded, opened)
    (opened / "test.json").write_text("{}")
    assert main(["fork", str(opened), "--round", "1"]) == 2
    assert "sealed test" in capsys.readouterr().err


def test_a_replay_with_the_same_rewarder_finds_the_same_and_generates_nothing(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal_before = (recorded / "journal.jsonl").read_bytes()
    assert main(["replay", str(recorded)]) == 0
    assert (recorded / "journal.jsonl").read_bytes() == journal_before
    [made] = (recorded / "replays").glob("*/replayed.json")
    found = json.loads(made.read_text())
    assert [r["before"] for r in found["rounds"]] == [r["after"] for r in found["rounds"]]
    lineage = journal.read(recorded / "journal.jsonl")[0]
    assert [[e["score"] for e in r] for r in found["rewards"]] == [[e.score for e in r.rewards] for r in lineage.rounds]
    assert "rank correlation" in capsys.readouterr().out


def test_a_replay_with_another_rewarder(recorded: Path) -> None:
    assert main(["replay", str(recorded), "rewarder=accept"]) == 0
    made = [json.loads(p.read_text()) for p in (recorded / "replays").glob("*/replayed.json")]
    [found] = [m for m in made if m["overrides"]]
    assert {r["after"] for r in found["rounds"]} == {1.0}
    assert found["spent"]["generated_tokens"] == 0


def test_a_run_that_went_on_is_replayed_anew(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "run", ignore=shutil.ignore_patterns("replays"))
    lines = (tmp_path / "run" / "journal.jsonl").read_text().splitlines(keepends=True)
    for rounds in (2, 3):
        (tmp_path / "run" / "journal.jsonl").write_text("".join(lines[: rounds + 1]))
        assert len(replay(tmp_path / "run", []).rounds) == rounds


def test_a_run_without_a_journal_is_not_replayed(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(recorded, tmp_path / "run")
    (tmp_path / "run" / "journal.jsonl").unlink()
    assert main(["replay", str(tmp_path / "run")]) == 2
    assert "has no round yet" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
from selfimprove import branch
kill, real = sys.argv[1], {n: getattr(branch, n) for n in ("append_line", "write_json")}
def dying(*arguments):
    real[kill](*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(branch, kill, dying)
branch.fork(Path(sys.argv[2]), 1, [f"run.folder={sys.argv[3]}"])
"""


@pytest.mark.parametrize("after", ["append_line", "write_json"])
def test_a_fork_that_was_killed_left_nothing_and_can_be_made_again(recorded: Path, tmp_path: Path, after: str) -> None:
    new = tmp_path / "new"
    assert subprocess.run([sys.executable, "-c", KILLED, after, str(recorded), str(new)]).returncode == -signal.SIGKILL
    assert not list(new.iterdir())
    assert main(["fork", str(recorded), "--round", "1", f"run.folder={new}"]) == 0
    assert journal.lineage_digest(new / "journal.jsonl") == journal.lineage_digest(recorded / "journal.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_a_replay_changes_rewards_only(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(recorded), "editor.edits=3"]) == 2
    assert "got editor" in capsys.readouterr().err


def test_runs_are_rows_that_can_be_filtered_sorted_and_compared(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "short"
    assert main(["run", "strategy=toy", "guard.rounds.rounds=1", "observer=[]", "seed=1", f"run.folder={other}"]) == 0
    shutil.copytree(recorded, tmp_path / "long")
    found = list(past.rows(tmp_path))
    assert [r["rounds"] for r in found] == [3, 1]
    assert [r["rounds"] for r in past.chosen(found, ["seed=1"])] == [1]
    assert [r["rounds"] for r in past.chosen(found, ["rounds>=1", "strategy!=srt"], "rounds")] == [1, 3]
    assert [r["seed"] for r in past.chosen(found, [], "-seed")] == [1, 0]
    assert {"seed", "guard.rounds.rounds", "rounds"} <= {k for k, _, _ in past.compared(*found)}
    capsys.readouterr()
    assert main(["runs", "rounds>1", "--root", str(tmp_path), "--sort=-best"]) == 0
    assert "toy" in capsys.readouterr().out
    assert main(["runs", "--compare", str(other), str(tmp_path / "long")]) == 0
    assert "guard.rounds.rounds" in capsys.readouterr().out
    frame = past.to_dataframe(tmp_path)
    assert list(frame["rounds"]) == [3, 1]


def test_a_branch_has_the_small_content_of_its_parts(tmp_path: Path) -> None:
    """Prompts, votes and code are made before the first round, which a branch does not make again."""
    old, new = tmp_path / "old", tmp_path / "new"
    closed = ["strategy=prompt_evolution", "task=toy", "engine=toy", 'editor.asking.template="{instruction}|{question}"', "observer=[]"]
    assert main(["run", *closed, "guard.rounds.rounds=1", f"run.folder={old}"]) == 0
    assert main(["fork", str(old), "--round", "0", f"run.folder={new}"]) == 0
    assert journal.lineage_digest(new / "journal.jsonl") == journal.lineage_digest(old / "journal.jsonl")
    assert main(["replay", str(old), "rewarder=prompt_evolution"]) == 0


@pytest.mark.parametrize("filters", [["strategi=toy"], ["toy"], ["=3"], ["strategy=[a"], ["strategy=2020-13-45"]])
def test_a_filter_that_is_none_is_refused(filters: list[str]) -> None:
    with pytest.raises(ConfigError, match="no filter|did you mean strategy|the value is no YAML"):
        past.chosen([{"strategy": "toy"}], filters)


def test_a_broken_run_is_a_row_that_says_so(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "bad")
    (tmp_path / "bad" / "journal.jsonl").write_text("{}\n")
    [found] = past.rows(tmp_path)
    assert "journal" in found["unreadable"]
    (tmp_path / "bad" / "journal.jsonl").write_text("[" * 100_000 + "\n")
    [found] = past.rows(tmp_path)
    assert "unreadable" in found
