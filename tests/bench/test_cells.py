from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from selfimprove.bench.cells import DONE, FAILED, RUNNING, WAITING, How, State, command, progress, run, states
from selfimprove.bench.matrix import Cell
from selfimprove.bench.opening import openings
from selfimprove.cli import main
from selfimprove.session import _locked

CELLS = [Cell("a", "t", s, ("strategy=toy",), f"key{s}") for s in range(3)]


def test_a_cell_that_fails_is_told_and_stops_no_other(tmp_path: Path) -> None:
    found = states(CELLS, tmp_path)
    seen: list[int] = []
    run(found, jobs=2, how=How("sh -c 'echo error: no room; exit 3'"), tell=lambda s: seen.append(sum(one.state == WAITING for one in s)))
    assert [(s.state, s.reason) for s in found] == [(FAILED, "no room")] * 3
    assert seen[0] == 1
    assert [s.state for s in states(CELLS, tmp_path)] == [WAITING] * 3, "the same command tries them again"


def test_a_cell_that_is_done_stays_done(tmp_path: Path) -> None:
    (tmp_path / "cells" / "key0").mkdir(parents=True)
    run(states(CELLS[:1], tmp_path), how=How("sh -c 'echo stopped because the budget is spent'"))
    again = states(CELLS, tmp_path)
    assert [(s.state, s.reason) for s in again] == [(DONE, "the budget is spent"), (WAITING, ""), (WAITING, "")]
    run(again, how=How("false"))
    assert [s.state for s in again] == [DONE, FAILED, FAILED]
    (tmp_path / "cells" / "key0").rmdir()
    assert states(CELLS, tmp_path)[0].state == WAITING, "its run is gone"


def test_a_measured_cell_whose_note_is_lost_is_done(tmp_path: Path) -> None:
    (tmp_path / "cells" / "key0").mkdir(parents=True)
    (tmp_path / "cells" / "key0" / "test.json").touch()
    assert [s.state for s in states(CELLS[:2], tmp_path)] == [DONE, WAITING]


def test_a_cell_in_whose_folder_a_process_works_is_waited_for(tmp_path: Path) -> None:
    """As the cell of a benchmark that was killed."""
    found, seen = states(CELLS[:2], tmp_path), set()
    found[0].folder.mkdir(parents=True)
    lock = [_locked(found[0].folder)]

    def tell(them: object) -> None:
        seen.add((found[0].state, found[0].reason, found[1].state))
        if found[1].state == DONE and lock:
            os.close(lock.pop())

    run(found, how=How("true"), tell=tell)
    assert (WAITING, f"another process works in {found[0].folder}", RUNNING) in seen
    assert [s.state for s in found] == [DONE, DONE]


def test_a_cell_that_fails_because_somebody_was_faster_is_tried_again(tmp_path: Path) -> None:
    found = states(CELLS[:1], tmp_path)
    found[0].folder.mkdir(parents=True)
    lock: list[int] = []

    def tell(them: object) -> None:
        if found[0].state == RUNNING and not (tmp_path / "free").exists():
            lock.append(_locked(found[0].folder))
        elif found[0].state == WAITING and lock:
            (tmp_path / "free").touch()
            os.close(lock.pop())

    run(found, how=How(f"sh -c 'sleep 0.05; test -e {tmp_path / 'free'}'"), tell=tell)
    assert found[0].state == DONE


@pytest.mark.parametrize("text", [b"", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n"], ids=["empty", "foreign", "no text", "deep"])
def test_a_journal_that_cannot_be_read_shows_no_progress(tmp_path: Path, text: bytes) -> None:
    [one] = states(CELLS[:1], tmp_path)
    one.folder.mkdir(parents=True)
    (one.folder / "journal.jsonl").write_bytes(text)
    assert progress(one) == (0, {}, None)


def test_a_benchmark_that_is_ended_ends_its_cells(tmp_path: Path) -> None:
    words = [
        "bench",
        "suite=smoke",
        "seeds=1",
        "nulls=[]",
        "--out",
        str(tmp_path),
        "--launch",
        f"sh -c 'echo $$ > {tmp_path / 'pid'}; exec sleep 100'",
    ]
    process = subprocess.Popen([sys.executable, "-m", "selfimprove.cli", *words])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_ended_while_it_starts_a_cell_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start, before = subprocess.Popen, signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args, **options))
        signal.raise_signal(number)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run(states(CELLS[:1], tmp_path), how=How("sh -c 'exec sleep 100'"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [p.poll() for p in started] == [-signal.SIGTERM]


def test_a_benchmark_leaves_signals_as_they_were_and_runs_in_a_thread_too() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["bench", "suite=nope"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor() as threads:
        assert threads.submit(main, ["bench", "suite=nope"]).result() == 2


def test_no_cell_starts_after_the_time(tmp_path: Path) -> None:
    found = states(CELLS, tmp_path)
    run(found, seconds=-1.0, how=How("true"))
    assert [s.state for s in found] == [WAITING] * 3


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    found: list[State] = states(CELLS[:1], tmp_path)
    run(found, how=How("sh -c 'kill -9 $$'"))
    assert found[0].reason == "killed by signal 9"


def test_a_benchmark_whose_cells_fail_still_reports_and_keeps_the_test_sealed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "suite=smoke", "seeds=1", "nulls=[greedy]", "--out", str(tmp_path), "--launch", "sh -c 'echo error: no room; exit 3'"]
    assert main(words) == 2
    told = capsys.readouterr()
    assert "2 of 2 cells failed" in told.err
    assert "FAILED: toy/toy, seed 0: no room" in told.out
    assert not openings(tmp_path)
    assert (tmp_path / "report.html").exists()


def test_cells_share_tiles_and_a_cell_that_has_begun_is_gone_on_with(tmp_path: Path) -> None:
    [one] = states(CELLS[:1], tmp_path)
    begins = ["run", "strategy=toy", f'run.folder="{one.folder}"', "--tiles", str(tmp_path / "tiles")]
    assert command(one, How(tiles=tmp_path / "tiles"))[3:] == begins
    one.folder.mkdir(parents=True)
    (one.folder / "config.yaml").touch()
    assert command(one, How(trust_env=True))[3:] == ["resume", str(one.folder), "--trust-env"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=nope"], "there is no suite"),
        (["suite=smoke", "--jobs", "0"], "--jobs wants"),
        (["suite=smoke", "--launch", "sh -c 'x"], '--launch "sh -c \'x" is no command line'),
        (["suite=smoke", "--launch", "nosuch -c 4"], "there is no program 'nosuch' here"),
        (["suite=smoke", "--launcher", "joblip"], "no Hydra launcher called 'joblip'"),
        (["suite=smoke", "--launcher", "basic", "--jobs", "2"], "leave out --jobs"),
        (["suite=smoke", "--launcher", "basic cores=2"], "write settings of basic as key=value"),
        (["suite=smoke", "--launcher", "basic cores"], "write settings of basic as key=value"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
