"""Running the cells: each a process of its own, some at a time, resumed where they were stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from selfimprove import journal, runfolder
from selfimprove.bench.matrix import Cell
from selfimprove.errors import SelfImproveError
from selfimprove.session import LOCK
from selfimprove.storage import write_json

POLL = 0.2
"""Seconds between two looks at the processes."""
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"


@dataclass
class State:
    """Where a cell stands."""

    cell: Cell
    folder: Path
    state: str = WAITING
    reason: str = ""
    """Why it failed, stopped, or waits for somebody else."""
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def record(self) -> Path:
        return self.folder.with_suffix(".json")


@dataclass(frozen=True)
class How:
    """How the processes of cells are started."""

    launch: str = ""
    """What to put before each command, such as ``srun -c 2``: a cluster's blocking launcher."""
    trust_env: bool = False
    tiles: Path | None = None
    """Where cells share finished tiles."""
    threads: int | None = None
    """Processor threads of each, where the environment does not say; None leaves them alone."""


def state(cell: Cell, out: Path) -> State:
    """A cell of a benchmark's folder that nobody has looked at."""
    return State(cell, out / "cells" / cell.key)


def states(cells: Sequence[Cell], out: Path) -> list[State]:
    """The cells as a benchmark's folder tells. What failed before waits for another try."""
    found = [state(c, out) for c in cells]
    for one in found:
        read(one)
        if one.state == WAITING and (one.folder / runfolder.TEST).exists():
            one.state = DONE  # its note is lost, and a run that was measured does not go on
        if one.state != DONE or not one.folder.is_dir():
            one.state, one.reason, one.seconds = WAITING, "", 0.0
    return found


def read(one: State) -> None:
    """Let a state say what the record of its cell says; one that cannot be read says nothing."""
    try:
        known = json.loads(one.record.read_text(encoding="utf-8"))
        one.state, one.reason, one.seconds = str(known["state"]), str(known["reason"]), float(known["seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # a record is only a note: without one the cell is resumed, and found to be finished


def run(
    cells: Sequence[State],
    jobs: int = 1,
    how: How = How(),
    seconds: float | None = None,
    tell: Callable[[Sequence[State]], None] = lambda states: None,
) -> None:
    """Run every cell that is not done, `jobs` at a time; each state says in the end whether it is done or failed.

    Args:
        seconds: start no more cells after so long; what has begun is finished.
        tell: called whenever something may have changed.
    """
    waiting = [s for s in cells if s.state != DONE]
    end = math.inf if seconds is None else time.monotonic() + seconds
    if jobs > 1:  # cells beside one another share the processors
        how = dataclasses.replace(how, threads=max(1, (os.cpu_count() or 1) // jobs))
    running: list[_Running] = []
    try:
        while waiting or running:
            if time.monotonic() > end:
                waiting.clear()
            while len(running) < jobs and (one := _free(waiting)):
                waiting.remove(one)
                with uninterrupted():  # or a process that has begun would be nobody's
                    running.append(_started(one, how))
            tell(cells)
            time.sleep(POLL)
            for entry in [e for e in running if e[1].poll() is not None]:
                running.remove(entry)
                _ended(*entry)
                if entry[0].state == FAILED and held(entry[0].folder):  # somebody else was faster, and fails no cell
                    entry[0].state = WAITING
                    waiting.append(entry[0])
        tell(cells)
    finally:
        for _, process, log, _ in running:
            process.terminate()
            process.wait()
            log.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """While inside, SIGTERM and an interrupt wait until the end."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there a signal is answered
        yield
        return
    before = {s: signal.signal(s, lambda number, _: came.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


def held(folder: Path) -> bool:
    """Whether a living process works in a run folder, as the cell of a benchmark that was killed may still do."""
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # nobody ever did
        return False
    return False


def perform(one: State, how: How) -> None:
    """Run one cell here and wait for it; its record says meanwhile that it runs, and then how it ended."""
    while held(one.folder):
        time.sleep(POLL)
    entry = _started(one, how)
    _note(one)
    entry[1].wait()
    _ended(*entry)


def command(state: State, how: How = How()) -> list[str]:
    """The command that starts a cell, or goes on with it."""
    cli = [sys.executable, "-m", "selfimprove.cli"]
    shares = [] if how.tiles is None else ["--tiles", str(how.tiles.absolute())]
    if (state.folder / runfolder.CONFIG).exists():
        return [*cli, "resume", str(state.folder), *shares, *(["--trust-env"] if how.trust_env else [])]
    folder = str(state.folder.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return [*cli, "run", *state.cell.overrides, f'run.folder="{folder}"', *shares]


def progress(state: State) -> tuple[int, dict[str, float], float | None]:
    """Rounds, totals of the ledger and the best score of a cell so far."""
    path = state.folder / runfolder.JOURNAL
    if not path.exists():
        return 0, {}, None
    try:
        lineage, ledger, _ = journal.read(path)
    except (SelfImproveError, OSError, RecursionError):  # it has just begun, or the report will say what is wrong
        return 0, {}, None
    best = lineage.best()
    return len(lineage), dict(ledger.get("totals", {})), None if best is None else lineage.score(best.id)


def _free(waiting: Sequence[State]) -> State | None:
    """The first cell in whose folder nobody works; the others say why they wait."""
    for one in waiting:
        one.reason = f"another process works in {one.folder}" if held(one.folder) else ""
        if not one.reason:
            return one
    return None


_Running = tuple[State, subprocess.Popen[bytes], IO[bytes], float]


def _started(state: State, how: How) -> _Running:
    state.state, state.reason = RUNNING, ""
    state.folder.parent.mkdir(parents=True, exist_ok=True)
    log = open(state.log, "ab")  # noqa: SIM115  it stays open as long as the process
    environment = dict(os.environ)
    if how.threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(how.threads))
    words = [*shlex.split(how.launch), *command(state, how)]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
    return state, process, log, time.monotonic()


def _ended(state: State, process: subprocess.Popen[bytes], log: IO[bytes], begun: float) -> None:
    log.close()
    state.seconds = time.monotonic() - begun
    lines = state.log.read_text(encoding="utf-8", errors="replace").splitlines() if state.log.exists() else []
    state.state = DONE if process.returncode == 0 else FAILED
    state.reason = _stopped(lines) if state.state == DONE else _failure(lines, process.returncode)
    _note(state)


def _note(state: State) -> None:
    note: dict[str, Any] = {"state": state.state, "reason": state.reason, "seconds": state.seconds, "overrides": list(state.cell.overrides)}
    write_json(state.record, note)


def _stopped(lines: Sequence[str]) -> str:
    return next((line.removeprefix("stopped because ") for line in reversed(lines) if line.startswith("stopped because ")), "")


def _failure(lines: Sequence[str], code: int) -> str:
    """The message of a failed command: its last line that says one, or how it ended."""
    said = [line for line in lines if line.startswith(("error: ", "a plugin broke")) or ("Error: " in line and not line.startswith(" "))]
    ended = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return said[-1].removeprefix("error: ") if said else ended
