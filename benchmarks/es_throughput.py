"""Evolution strategies against pure batch inference on one machine: tokens per second while a population is evaluated, and memory.

    python benchmarks/es_throughput.py                     # a population of 64, 3 repetitions
    python benchmarks/es_throughput.py --population 16 --questions 1 --tokens 8 --repetitions 1
    python benchmarks/es_throughput.py --dtype bfloat16 float32
    python benchmarks/es_throughput.py --device cuda

The work is `population` × `questions` completions of exactly `tokens` sampled tokens each. Three sides take turns on it, after a small warm-up that
does not count, and medians are compared:

* inference: the unperturbed model, all rows in one call;
* eggroll: the same prompts, row by row, each member of the population under low-rank noise of its own;
* es: the same under full-rank noise, on as many members as `--members` says, since each costs the same.

`es_of_inference` is eggroll's tokens per second as a share of inference's where every row has a prompt of its own, so that both sides read as many
prompt tokens. With common random numbers all members get the same questions; then the unperturbed model reads each of them once, and a population
cannot: `es_of_inference_same_prompts` is that share. `plain_es_of_inference` is es's share of the same. Memory is the peak of a process of its own
from the opened model on, with equally many rows (Linux, or a GPU): of inference, of eggroll for each population, and of es. The last line is one
JSON object, of the type that came last; the rest is in benchmarks/results/es_throughput.json, which keeps what it holds of other types.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _machine import RESULTS, commit, describe, median, timed, versions, warn_if_busy, write

from selfimprove.ledger import Ledger
from selfimprove.models import Generate, Models, Perturb
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

KEYS = ("es_of_inference", "es_of_inference_same_prompts", "plain_es_of_inference", "eggroll_x_plain_es")
SIGMA = 0.001
SIDES = ("inference", "es", "eggroll")
"""Whose peak of memory is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--population", type=int, default=64)
    parser.add_argument("--questions", type=int, default=4, help="questions of each member")
    parser.add_argument("--tokens", type=int, default=32, help="sampled tokens of each answer")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--members", type=int, default=2, help="members that plain ES is timed on")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", default=[8, 16, 32, 64], help="populations whose peak memory is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "es_throughput.json")
    parser.add_argument("--peak", choices=SIDES, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(json.dumps(peak(argparse.Namespace(**{**vars(options), "dtype": options.dtype[0]}))))
        return
    found: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        found = json.loads(options.out.read_text())["dtypes"]
    for dtype in options.dtype:
        name, content = measured(argparse.Namespace(**{**vars(options), "dtype": dtype}))
        found[name] = content
        write(options.out, {"keys": next(iter(found.values()))["keys"], "dtypes": found})
    print(json.dumps({n: round(found[name]["keys"][n], 3) for n in KEYS}))


def measured(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The name of a type, and what there is to know of it."""
    load = warn_if_busy()
    bench = Bench(options)
    seconds = bench.measure()
    rows = options.population * options.questions
    rates = {side: rows * share * options.tokens / median(found) for (side, share), found in seconds.items()}
    by_side = {side: rate for (side, _), rate in zip(seconds, rates.values(), strict=True)}
    keys = {
        "es_of_inference": by_side["eggroll"] / by_side["inference"],
        "es_of_inference_same_prompts": by_side["eggroll_same_prompts"] / by_side["inference_same_prompts"],
        "plain_es_of_inference": by_side["es"] / by_side["inference_same_prompts"],
        "eggroll_x_plain_es": by_side["eggroll_same_prompts"] / by_side["es"],
    }
    content = {
        "keys": keys,
        "tokens_per_second": by_side,
        "seconds": {side: found for (side, _), found in seconds.items()},
        "memory": memory(options),
        "options": {n: v for n, v in vars(options).items() if n not in ("out", "peak")},
        "load_average_before": load,
        "machine": {**describe(bench.engine.device), "dtype": str(bench.engine.dtype)},
        "engine": dict(bench.engine.key),
        "commit": commit(),
        "versions": versions(),
    }
    return str(bench.engine.dtype).removeprefix("torch."), content


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks by side, of eggroll by population, and how much they grow from the smallest population to the largest."""
    if not options.memory:
        return {}
    eggroll = {str(n): in_a_process(options, "eggroll", n) for n in sorted(options.memory)}
    small, large = (eggroll[str(end(options.memory))] for end in (min, max))
    growth = {n: large[n] - small[n] for n in ("peak_mib", "factors_mib")}
    return {**{side: in_a_process(options, side, 2) for side in ("inference", "es")}, "eggroll": eggroll, "eggroll_growth": growth}


class Bench:
    """The engine, and the work of each side."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = TorchEngine(options.model, options.dtype, options.device, options.threads)
        # no answer ends before its limit, so that all sides write equally many tokens
        self.engine.frozen.stop_ids = set()

    def measure(self) -> dict[tuple[str, float], list[float]]:
        """Seconds of every repetition, by side and the share of the work that it did."""
        options = self.options
        few = min(options.members, options.population)
        sides: dict[tuple[str, float], Callable[[Models], Sequence[Generate]]] = {
            ("inference", 1.0): partial(self.requests, rank=None, apart=True),
            ("eggroll", 1.0): partial(self.requests, rank=options.rank, apart=True),
            ("inference_same_prompts", 1.0): partial(self.requests, rank=None, apart=False),
            ("eggroll_same_prompts", 1.0): partial(self.requests, rank=options.rank, apart=False),
            ("es", few / options.population): partial(self.requests, rank=0, apart=False, population=few),
        }
        for make in sides.values():
            self.run(make, small=True)
        found: dict[tuple[str, float], list[float]] = {side: [] for side in sides}
        for _ in range(options.repetitions):
            for side, make in sides.items():
                found[side].append(self.run(make))
                print(f"{side[0]:24s} {found[side][-1]:8.2f} s", file=sys.stderr, flush=True)
        return found

    def run(self, make: Callable[[Models], Sequence[Generate]], small: bool = False) -> float:
        with tempfile.TemporaryDirectory() as folder:
            models = Models(self.engine, Path(folder), Ledger())
            requests = make(models)
            requests = requests[:: max(1, len(requests) // 4)] if small else requests
            seconds, completions = timed(self.engine.device, lambda: models.generate(requests))
            assert all(c.tokens == self.options.tokens for c in completions)
        return seconds

    def requests(self, models: Models, rank: int | None, apart: bool, population: int | None = None) -> list[Generate]:
        """Every member's questions.

        Args:
            rank: of the noise; None asks the unperturbed model.
            apart: give every row a prompt of its own, instead of every member the same questions.
        """
        count, questions = population or self.options.population, self.options.questions
        policies: Sequence[Part] = [models.root] * count
        if rank is not None:
            policies = models.derive([Perturb(models.root, i // 2, SIGMA, 1 - 2 * (i % 2), rank) for i in range(count)])
        return [
            Generate(policy, question(k * questions + j if apart else j), self.options.tokens, 1.0, seed=k * questions + j)
            for k, policy in enumerate(policies)
            for j in range(questions)
        ]


def question(number: int) -> str:
    """A product of two-digit numbers. They come first, so that no two prompts have a beginning in common that could be computed once."""
    return f"{10 + number % 90} times {10 + number // 90 % 90}: what is the product of these two numbers? Reply with only the number."


def in_a_process(options: argparse.Namespace, side: str, population: int) -> dict[str, float]:
    """What `peak` tells of a side, for a population of this size. All have equally many rows."""
    rows = max([options.population, *options.memory])
    sizes = {"population": population, "questions": max(1, rows // population), "tokens": options.tokens, "rank": options.rank}
    engine = {"model": options.model, "device": options.device, "dtype": options.dtype, "threads": options.threads}
    arguments = [str(x) for name, value in {**engine, **sizes, "peak": side}.items() for x in (f"--{name}", value)]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of evaluating a population, in MiB, and what of it can be told apart: the factors of low-rank noise; the scratch buffer of
    full-rank noise, which is as large as the largest weight, and the table that its windows are taken from."""
    bench = Bench(options)
    rank = {"inference": None, "es": 0, "eggroll": options.rank}[options.peak]
    with tempfile.TemporaryDirectory() as folder:
        models = Models(bench.engine, Path(folder), Ledger())
        _forget_peak(bench.engine.device)
        before = _peak(bench.engine.device)
        requests = bench.requests(models, rank, apart=True)
        models.generate(requests)
        found = {"peak_mib": _peak(bench.engine.device), "loaded_mib": before, "rows": float(len(requests))}
        sizes = (
            [w.numel() * bench.engine.dtype.itemsize / 2**20 for w in models.adapter(requests[0].policy.digest).values()] if rank is not None else []
        )
    if rank is None:
        return found
    if rank:
        return {**found, "factors_mib": options.population * sum(sizes)}
    return {**found, "scratch_mib": max(sizes), "table_mib": bench.engine.table.values.nbytes / 2**20}


def _forget_peak(device: torch.device) -> None:
    """Count the peak anew from here: opening a model takes more than it leaves."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    """MiB. Not `getrusage`, whose peak a process takes over from the one that starts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


if __name__ == "__main__":
    main()
