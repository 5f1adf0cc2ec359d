"""What torch, PEFT and transformers offer for a piece of the engine's work, against what the engine does now; alternately, in one run, medians.

    python benchmarks/alternatives.py                             # within 4 minutes on two cores
    python benchmarks/alternatives.py --only attention loss --device cuda

Each piece (`_alternatives.py`) is done in several ways, the engine's first. Every way runs once uncounted, and its result is compared with the
engine's. One that cannot run here is a row with the reason. Writes benchmarks/results/alternatives.json, which docs/decisions/0010
reads; --out names another file.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _alternatives import PARTS, Bench, Work
from _machine import RESULTS, commit, describe, median, timed, versions, warn_if_busy, write
from growth import _forget_peak, _peak
from torch import Tensor

Row = dict[str, Any]
"""One way of doing some work: seconds, ratio to the engine's, and how far the result is from the engine's; or the reason why it was not done."""


def compare(work: Work, device: torch.device, repetitions: int) -> dict[str, Row]:
    """A row for every way."""
    rows: dict[str, Row] = {}
    engines: Any = None
    for name, way in work.ways.items():
        before = _forget_peak(device)
        try:
            first, result = timed(device, way)
        except Exception as e:  # noqa: BLE001  what a library lacks on a device it says in ways of its own
            rows[name] = {"reason": f"{type(e).__name__}: {next(iter(str(e).splitlines()), '')}"}
            continue
        engines = result if engines is None else engines
        rows[name] = {"first_seconds": first, "peak_bytes": _peak(device) - before, **apart(result, engines), "runs": []}
    done = {name: row for name, row in rows.items() if "runs" in row}
    for _ in range(repetitions):
        for name, row in done.items():
            row["runs"].append(timed(device, work.ways[name])[0])
    for row in done.values():
        row["seconds"] = median(row["runs"])
        row["ratio"] = row["seconds"] / next(iter(done.values()))["seconds"]
    return rows


def apart(result: Any, engines: Any) -> Row:
    """The largest difference by the engine's largest number, or the share of texts that are the same."""
    if isinstance(result, Tensor):
        return {"difference": float((result.float() - engines.float()).abs().max() / engines.float().abs().max())}
    return {"same_text": sum(a == b for a, b in zip(result, engines, strict=True)) / len(engines)}


def table(work: Work, rows: dict[str, Row]) -> Iterator[str]:
    yield f"\n{work.kind}: {work.unit}"
    for name, row in rows.items():
        agrees = f"difference {row['difference']:.0e}" if "difference" in row else f"same text {row.get('same_text', 0):.2f}"
        numbers = "{seconds:9.4f} s {ratio:6.2f} x | first {first_seconds:6.2f} s | {peak_bytes:14,d} bytes"
        yield f"{name}: {row['reason']}" if "reason" in row else f"{numbers.format(**row)} | {agrees} | {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "alternatives.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # peft and trl use names that transformers has replaced
    load, begin = warn_if_busy(), time.monotonic()
    bench = Bench(options.model, options.device, options.threads)
    found: dict[str, Any] = {}
    for part in options.only:
        for work in PARTS[part](bench):
            rows = compare(work, bench.device, options.repetitions)
            assert work.kind not in found, work.kind
            found[work.kind] = {"unit": work.unit, "ways": rows}
            print("\n".join(table(work, rows)), flush=True)
    machine = {**describe(bench.device), "load_average_at_the_start": load, "load_average_at_the_end": os.getloadavg()[0]}
    made = {"work": found, "engine": dict(bench.engine.key), "machine": machine, "versions": versions(), "commit": commit()}
    write(options.out, {"command": sys.argv[1:], **made, "seconds": time.monotonic() - begin})


if __name__ == "__main__":
    main()
