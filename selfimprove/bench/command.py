"""`selfimprove bench`: the matrix is run, the sealed test opened once, the report written."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selfimprove import config as configuration
from selfimprove.bench import cells, launching
from selfimprove.bench.drawing import undrawable
from selfimprove.bench.live import Board
from selfimprove.bench.matrix import matrix
from selfimprove.bench.merging import merged
from selfimprove.bench.opening import FAILURES, unmeasured
from selfimprove.bench.report import write
from selfimprove.bench.result import result
from selfimprove.bench.suite import AT_EQUAL_COST, suite_of
from selfimprove.bench.verdicts import WAITS
from selfimprove.errors import ConfigError, UserError
from selfimprove.report.safe import safe
from selfimprove.storage import write_json

RESULT, CELLS, TILES = "result.json", "cells.json", "tiles"


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """While inside, SIGTERM ends the command as an interrupt does, so that the processes it started end with it."""
    if threading.current_thread() is not threading.main_thread():  # only there a signal can be answered
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@_ending()
def bench(
    words: Sequence[str],
    out: Path | None,
    console: Console,
    *,
    jobs: int = 1,
    launch: str = "",
    launcher: str = "",
    hours: float | None = None,
    open_anyway: bool = False,
    trust_env: bool = False,
) -> Path:
    """The folder of the benchmark, whose report says what it found.

    Args:
        words: what to compare, as `suite.suite_of` takes it.
        out: the folder; ``runs/bench/<suite>`` where it is None. A folder that holds cells of the same configuration is gone on with.
        jobs: cells at a time.
        launch: what to put before the command of a cell.
        launcher: the Hydra launcher that runs the cells instead, and its settings: ``submitit_slurm partition=gpu``.
        hours: start no more cells after so long.
        open_anyway: open the test although some cells failed.

    Raises: ConfigError, before anything runs; UserError, where cells failed or were not measured, after the others and the report.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs wants at least 1; got {jobs}")
    if (first := _words("--launch", launch)[:1]) and shutil.which(first[0]) is None:
        raise ConfigError(f"--launch wants words that start a command; there is no program {first[0]!r} here: install it, or give its path")
    chosen = configuration.launcher(named) if (named := _words("--launcher", launcher)) else []
    if chosen and (jobs > 1 or launch):
        raise ConfigError("a launcher says itself where and how many at a time (--launcher 'joblib n_jobs=2'); leave out --jobs and --launch")
    suite = suite_of(words)
    with console.status(f"composing the cells of suite {suite.name}"):  # half a second each
        made = matrix(suite)
    folder = out or Path("runs", "bench", suite.name)
    states = cells.states(made.cells, folder)
    if any(s.state != cells.DONE for s in states) and (reason := undrawable(made.tasks)):
        raise ConfigError(f"suite {suite.name}, {reason}")
    board = Board(suite, made, console)
    how = cells.How(launch, trust_env, folder / TILES)
    seconds = None if hours is None else hours * 3600
    with board.shown():
        if chosen:
            launching.run(states, folder, chosen, how, seconds, board.tell)
        else:
            cells.run(states, jobs, how, seconds, board.tell)
    keys = {s.cell.key: s.state for s in states}
    write_json(folder / CELLS, keys)
    failed = [s for s in states if s.state == cells.FAILED]
    left = [s for s in states if s.state == cells.WAITING]
    if not left and not failed:
        shutil.rmtree(folder / TILES, ignore_errors=True)  # it saved time, and nobody needs it any more
    if not left and (open_anyway or not failed) and unmeasured(folder, keys):
        _open_test(folder, keys, trust_env, console)
    found = result(suite, made, states, folder, _failures(folder))
    _report(found, folder, console)
    if left:
        console.print(f"{len(left)} of {len(states)} cells are left; the same command goes on with them", markup=False, highlight=False)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(states)} cells failed, so the report lacks them; mend what their logs say and give the same command again"
            + ("" if open_anyway else ", or open the test for the others with --open")
        )
    if not left and (lacking := [f for f in found["failures"] if f["reason"] != WAITS]):
        raise UserError(f"{len(lacking)} of {len(states)} cells have no test score, so the report lacks them; it says why of each")
    return folder


def _open_test(folder: Path, keys: Mapping[str, str], trust_env: bool, console: Console) -> None:
    """Measure the sealed test in a process of its own, telling how far it is. Raises: UserError, where that process fails."""
    command = [sys.executable, "-m", "selfimprove.bench.opening", str(folder), *(["--trust-env"] if trust_env else [])]
    whole, told = len(unmeasured(folder, keys)), -1
    with open(folder / "test.log", "ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as opened:
        try:
            ended = False
            while not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    opened.wait(1)
                    ended = True
                if (done := whole - len(unmeasured(folder, keys))) != told:
                    console.print(f"sealed test: {done} of {whole} cells are measured", markup=False, highlight=False)
                    told = done
        except BaseException:
            opened.kill()  # what it has measured stays
            raise
    if opened.returncode:
        raise UserError(f"the process that measures the sealed test ended with code {opened.returncode}; {folder / 'test.log'} says why")


def merge(paths: Sequence[Path], out: Path | None, console: Console) -> Path:
    """The folder of a benchmark whose seeds ran as several ones, with one report of all; ``runs/bench/<suite>`` where `out` is None.

    Raises: StorageError, ConfigError: see `merging.merged`.
    """
    found = merged(paths)
    folder = out or Path("runs", "bench", found["suite"])
    if (folder / CELLS).exists() or (folder / RESULT).resolve() in {(p / RESULT if p.is_dir() else p).resolve() for p in paths}:
        raise ConfigError(f"{folder} holds a benchmark of its own, whose report would be lost; name another folder with --out")
    _report(found, folder, console)
    return folder


def _report(found: Mapping[str, Any], folder: Path, console: Console) -> None:
    write_json(folder / RESULT, found)
    for line in write(found, folder):
        console.print(safe(line), highlight=False, soft_wrap=True)


def listed(words: Sequence[str]) -> Iterator[str]:
    """Every cell of a benchmark and the command that would run it. Raises: ConfigError."""
    suite = suite_of(words)
    made = matrix(suite)
    for cell in made.cells:
        yield f"{cell.task}/{cell.arm} seed {cell.seed}: selfimprove run {shlex.join(cell.overrides)}"
    for what, why in made.left_out.items():
        yield f"left out: {what}, because {why}"
    # Small beside it: what a last round spends beyond the budget, and the untouched model's few samples elsewhere.
    most = math.fsum(suite.budgets[a.task] * len(a.cells) for a in made.arms if a.trained or a.kind in AT_EQUAL_COST)
    yield f"{len(made.cells)} cells of {len(made.arms)} arms; about {most:.2g} {suite.unit} in all, the sealed test aside; nothing was started"


def _words(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise ConfigError(f"{option} {text!r} is no command line ({e}); quote it as a shell would want it") from e


def _failures(folder: Path) -> dict[str, str]:
    try:
        found: dict[str, Any] = json.loads((folder / FAILURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()}
