"""Handing the cells to a Hydra launcher (joblib, submitit, Ray), and following them by what they write."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from selfimprove.bench.cells import DONE, FAILED, POLL, RUNNING, WAITING, How, State, read, uninterrupted
from selfimprove.bench.launched import ORDERS
from selfimprove.storage import write_json

LOG = "launched.log"


def run(
    states: Sequence[State],
    out: Path,
    chosen: Sequence[str],
    how: How,
    seconds: float | None = None,
    tell: Callable[[Sequence[State]], None] = lambda states: None,
) -> None:
    """Run every cell that is not done, as the launcher arranges; each state says in the end whether it is done or failed.

    Args:
        chosen: the overrides of Hydra that choose a launcher, as `config.launcher` gives them.
        seconds: start no more cells after so long.
        tell: called whenever something may have changed.
    """
    open_ = [s for s in states if s.state != DONE]
    if not open_:
        return
    until = None if seconds is None else time.time() + seconds
    for one in open_:
        one.record.unlink(missing_ok=True)  # it tells of an earlier try
    cells = {s.cell.key: dataclasses.asdict(s.cell) for s in open_}
    tiles = None if how.tiles is None else str(how.tiles.absolute())
    write_json(out / ORDERS, {"cells": cells, "until": until, "trust_env": how.trust_env, "tiles": tiles})
    with open(out / LOG, "ab") as log:
        process = None
        try:
            with uninterrupted():
                process = subprocess.Popen(
                    command(out, list(cells), chosen), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            while process.poll() is None:
                tell(states)
                time.sleep(POLL)
                for one in open_:
                    read(one)
        finally:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # a queue's jobs are not of the group, and go on
                process.wait()
    for one in open_:
        read(one)
        late = until is not None and time.time() > until
        if one.state == RUNNING or (one.state == WAITING and not late):
            one.state, one.reason = FAILED, f"the launcher ended without it ({_last(out / LOG)}); {out / LOG} has what it said"
    tell(states)


def command(out: Path, keys: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """What starts the launcher."""
    here = str(out.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    return [
        sys.executable,
        "-m",
        "selfimprove.bench.launched",
        "-m",
        *chosen,
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        "hydra/hydra_logging=disabled",
        f'hydra.sweep.dir="{here}/launched"',
        "hydra.sweep.subdir=${hydra.job.num}",
        f'+out="{here}"',
        "+cell=" + ",".join(f'"{k}"' for k in keys),  # quoted: a key may look like a number
    ]


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
