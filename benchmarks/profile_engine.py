"""Where the engine's time goes: the share of every kind of operation in training a bank and in generating with it.

    python benchmarks/profile_engine.py [--device cuda]

The work is that of `inner_loop.py --quick`: 16 self-edits, then 7 questions each. Writes benchmarks/results/profile.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import RESULTS, commit, describe, versions
from inner_loop import PAPER, QUICK, Bench
from torch.profiler import ProfilerActivity, profile

from selfimprove.models import Generate, hub
from selfimprove.storage import write_json

SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "profile.json")
    options = parser.parse_args()
    bench = Bench(hub.model_path(hub.EMBEDDED), options.device, options.threads, QUICK)
    with tempfile.TemporaryDirectory() as folder:
        models = bench.models(Path(folder))
        requests = bench.requests(PAPER, QUICK.edits, QUICK.documents, 2)
        trained: list[Any] = []
        found = {"train": shares(bench, lambda: trained.extend(models.train(requests)))}
        inner = bench.loops[PAPER]
        asked = [
            Generate(t.policy, inner.prompt(e.item, q.text), 12, temperature=0.0, stop=("\n",))
            for t, e in zip(trained, bench.edits, strict=True)
            for q in e.item.questions
        ]
        found["generate"] = shares(bench, lambda: models.generate(asked))
    for call, operations in found.items():
        print(call + ": " + ", ".join(f"{name} {share:.3f}" for name, share in operations.items()))
    engine = {"engine": dict(bench.engine.key)}
    write_json(options.out, {"shares": found, "commit": commit(), "versions": versions(), "machine": {**describe(bench.device), **engine}})


def shares(bench: Bench, work: Callable[[], Any]) -> dict[str, float]:
    """The share of the whole time that each kind of operation takes itself, largest first."""
    cuda = bench.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        work()
        if cuda:
            torch.cuda.synchronize()
    time = {e.key: float(e.self_device_time_total if cuda else e.self_cpu_time_total) for e in seen.key_averages()}
    whole = sum(time.values())
    return {name: round(t / whole, 4) for name, t in sorted(time.items(), key=lambda x: -x[1])[:SHOWN]}


if __name__ == "__main__":
    main()
