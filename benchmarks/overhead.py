"""What the framework itself costs: runs whose plugins do nothing, at growing sizes.

    python benchmarks/overhead.py

Every size is run in a process of its own, ten trials a round. Reported for each: seconds (and how much of it was waiting for
the disk to confirm writes), peak memory above that at the start, and bytes of the run folder; for each of them the slope
of its logarithm over that of the number of trials: 1 is linear growth. Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
TRIALS_A_ROUND = 10
RESULTS = Path(__file__).parent / "results" / "overhead.json"


def measure(trials: int) -> dict[str, float]:
    """Seconds, bytes and peak memory of one run; called in a fresh process."""
    from selfimprove.evaluators import RewardIsScore
    from selfimprove.retention import Retention
    from selfimprove.testing import noop_roles, toy_session

    waited = [0.0]
    fsync = os.fsync

    def timed(file: int) -> None:
        begin = time.perf_counter()
        fsync(file)
        waited[0] += time.perf_counter() - begin

    os.fsync = timed  # type: ignore[assignment]
    roles = noop_roles(edits=TRIALS_A_ROUND, evaluator=RewardIsScore())
    with tempfile.TemporaryDirectory() as folder:
        session = toy_session(Path(folder), rounds=trials // TRIALS_A_ROUND, retention=Retention(), **roles)
        before = _memory()
        begin, cpu = time.perf_counter(), time.process_time()
        lineage = session.improve()
        seconds, processor = time.perf_counter() - begin, time.process_time() - cpu
        grown = _memory() - before
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        begin = time.perf_counter()
        toy_session(Path(folder), rounds=1, **roles).close()
        reopened = time.perf_counter() - begin
    done = sum(len(r.trials) for r in lineage.rounds)
    if done != trials:
        raise AssertionError(f"{done} trials instead of {trials}")
    return {
        "trials": trials,
        "rounds": len(lineage),
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_waiting_for_the_disk": waited[0],
        "milliseconds_per_trial": 1e3 * seconds / trials,
        "memory_bytes": grown,
        "disk_bytes": size,
        "seconds_to_reopen": reopened,
    }


def slope(rows: list[dict[str, float]], field: str) -> float:
    """The exponent of growth: least squares of log(field) over log(trials)."""
    xs = [math.log(r["trials"]) for r in rows]
    ys = [math.log(max(r[field], 1e-9)) for r in rows]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of trials")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = []
    for size in options.sizes:
        done = subprocess.run([sys.executable, __file__, "--one", str(size)], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        last = rows[-1]
        print(f"{size:>8,} trials: {last['milliseconds_per_trial']:.3f} ms a trial, {last['memory_bytes'] / 1e6:.1f} MB more memory", flush=True)
    fields = ("seconds", "processor_seconds", "memory_bytes", "disk_bytes")
    result: dict[str, Any] = {
        "what": f"runs of plugins that do nothing, {TRIALS_A_ROUND} trials a round, every trial a scored child",
        "how": "python benchmarks/overhead.py",
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in ("selfimprove", "pluggy", "numpy")}},
        "machine": {"cores": os.cpu_count(), "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)},
        "load_average_at_the_end": os.getloadavg()[0],
        "rows": rows,
        "slopes": {f: slope(rows, f) for f in fields},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("slopes: " + ", ".join(f"{f} {s:.2f}" for f, s in result["slopes"].items()))


def _memory() -> int:
    """Peak resident bytes of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
