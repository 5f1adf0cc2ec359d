"""How the cost of the model layer grows: seconds and peak memory against the number of adapters, the length of documents, and the rank.

    python benchmarks/growth.py
    python benchmarks/growth.py --quick          # three points of each
    python benchmarks/growth.py --only rank      # one axis, beside those that the result already has

Every point is a process of its own, which trains K adapters for a few steps of one document each, then generates and scores under all of them.
Writes benchmarks/results/growth.json, a table (growth.md) and a plot (growth.svg).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import RESULTS, commit, describe, median, timed, versions, warn_if_busy, write

GENERATED = 16
"""Tokens that each adapter generates."""


@dataclass(frozen=True)
class Point:
    """What one process measures."""

    adapters: int = 8
    length: int = 48
    """Tokens of a document, about."""
    rank: int = 16
    steps: int = 3


AXES: dict[str, tuple[str, tuple[int, ...], Point]] = {
    "adapters": ("adapters that train together (K)", (1, 2, 4, 8, 16, 32, 64), Point()),
    "length": ("tokens of a document", (16, 32, 64, 128, 256, 512, 1024), Point(adapters=4)),
    "rank": ("rank", (1, 2, 4, 8, 16, 32, 64, 128), Point()),
}
CALLS = ("train", "generate", "score")


def measure(point: Point, model: str, device: str, threads: int) -> dict[str, float]:
    """Seconds of a step, of generating and of scoring, and peak bytes; called in a fresh process."""
    from selfimprove.ledger import Ledger
    from selfimprove.models import Document, Generate, Lora, Models, Score, Train
    from selfimprove.models.api import ATTENTION, MLP
    from selfimprove.models.torch_engine import TorchEngine
    from selfimprove.tasks.biographies import Biographies

    engine = TorchEngine(model, device=device, threads=threads, bank=point.adapters)
    people = Biographies(train=point.adapters, validation=0, test=0).people("train")
    texts = [_cut(engine.tokenizer, " ".join([p.text] * 20), point.length - 1) for p in people]
    opened = _forget_peak(engine.device)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(engine, Path(folder), Ledger())

        def train(steps: int, seed: int) -> Any:
            lora = Lora(point.rank, 2 * point.rank, (*ATTENTION, *MLP), 1e-3, epochs=steps)
            return models.train([Train(models.root, (Document(t),), lora, seed + k) for k, t in enumerate(texts)])

        train(1, point.adapters)  # kernels are loaded and compiled
        one, trained = timed(engine.device, lambda: train(1, 0))
        more, _ = timed(engine.device, lambda: train(1 + point.steps, 0))  # what is spent once a call falls out of the difference
        tokens = sum(t.tokens for t in trained)
        policies = [t.policy for t in trained]
        prompts = [_cut(engine.tokenizer, t, max(1, point.length - GENERATED)) for t in texts]
        written = [Generate(p, t, GENERATED, temperature=0.0) for p, t in zip(policies, prompts, strict=True)]
        scored = [Score(p, t, " and was remembered.") for p, t in zip(policies, prompts, strict=True)]
        generate, _ = timed(engine.device, lambda: models.generate(written))
        score, _ = timed(engine.device, lambda: models.score(scored))
    step = max(0.0, more - one) / point.steps
    peak = _peak(engine.device)
    return {
        **dataclasses.asdict(point),
        "tokens_of_a_step": tokens,
        "train_seconds": step,
        "train_tokens_per_second": tokens / step if step else 0.0,
        "generate_seconds": generate,
        "score_seconds": score,
        "peak_bytes": peak,
        "peak_bytes_above_the_model": peak - opened,
    }


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[:tokens]))


def _forget_peak(device: Any) -> int:
    """Count the peak anew from what is in use now; these bytes."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # Linux with glibc: pages that opening the model has freed go back first
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: Any) -> int:
    """Peak bytes: of the GPU's memory, or resident in this process."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: dict[str, list[dict[str, float]]], how: str, file: str) -> str:
    """The points as Markdown, an axis after the other."""
    found = [f"# How cost grows\n\nMade by `{how}`; the numbers and the machine are in `{file}`.\n"]
    for axis, points in rows.items():
        base = AXES[axis][2]
        fixed = ", ".join(f"{n} {getattr(base, n)}" for n in ("adapters", "length", "rank") if n != axis)
        found.append(f"## {AXES[axis][0]} ({fixed})\n")
        found.append(
            f"| {axis} | seconds a step | trained tokens/s | seconds to generate {GENERATED} each | seconds to score | peak MB above the model |"
        )
        found.append("|---:|---:|---:|---:|---:|---:|")
        for p in points:
            cells = f"{p['train_seconds']:.3f} | {p['train_tokens_per_second']:,.0f} | {p['generate_seconds']:.2f} | {p['score_seconds']:.2f}"
            found.append(f"| {p[axis]:.0f} | {cells} | {p['peak_bytes_above_the_model'] / 1e6:,.0f} |")
        found.append("")
    return "\n".join(found)


def plot(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Seconds (above) and memory (below) against each axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, and the file small
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # equal numbers make equal files
    from matplotlib import pyplot

    colours = dict(zip(CALLS, ("#0072B2", "#D55E00", "#009E73"), strict=True))  # Okabe and Ito's, told apart by marker too
    figure, axes = pyplot.subplots(2, len(rows), figsize=(4 * len(rows), 6), squeeze=False, sharex="col", sharey="row", layout="constrained")
    for column, (axis, points) in enumerate(rows.items()):
        seconds, memory = axes[:, column]
        x = [p[axis] for p in points]
        for call, marker in zip(CALLS, "os^", strict=True):
            seconds.plot(
                x, [p[f"{call}_seconds"] for p in points], color=colours[call], marker=marker, label="train, one step" if call == "train" else call
            )
        memory.plot(x, [p["peak_bytes_above_the_model"] / 1e6 for p in points], color="black", marker="o")
        for panel in (seconds, memory):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.grid(alpha=0.3)
        memory.set_xlabel(AXES[axis][0])
        memory.set_xticks(x, [f"{v:.0f}" for v in x])
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak MB above the model")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three points of each axis")
    parser.add_argument("--only", nargs="+", choices=AXES, default=list(AXES), help="some of the axes; what the result has of the others stays")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repetitions", type=int, default=3, help="processes a point; their median counts")
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json", help="the table and the plot are written beside it")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(Point(**json.loads(options.one)), options.model, options.device, options.threads)))
        return
    import torch

    device = torch.device(options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    load = warn_if_busy()
    kept = json.loads(options.out.read_text()) if options.only != list(AXES) and options.out.exists() else {"points": {}, "runs": {}}
    shared = ["--model", options.model, "--device", options.device, "--threads", str(options.threads)]
    about = {
        "how": " ".join(["python benchmarks/growth.py", *sys.argv[1:]]),
        "processes_a_point": options.repetitions,
        "machine": {**describe(device), "threads": options.threads, "load_average_at_the_start": load},
        "versions": versions(),
        "commit": commit(),
    }
    for axis in options.only:
        _, values, base = AXES[axis]
        some = _three(values) if options.quick else values
        kept["points"][axis] = [_apart(dataclasses.replace(base, **{axis: v}), shared, options.repetitions) for v in some]
        kept["runs"][axis] = about
        rows = {a: kept["points"][a] for a in AXES if a in kept["points"]}
        write(options.out, {"points": rows, "runs": kept["runs"]})  # after every axis, so that a later one's failure costs nothing of it
        hows = dict.fromkeys(kept["runs"][a]["how"] for a in rows)
        options.out.with_suffix(".md").write_text(table(rows, "`, `".join(hows), options.out.name))
        plot(rows, options.out.with_suffix(".svg"))


def _three(values: Sequence[int]) -> Sequence[int]:
    return values[0], values[len(values) // 2], values[-2]


def _apart(point: Point, shared: Sequence[str], repetitions: int) -> dict[str, float]:
    """The point, measured in processes of its own: the median of every number."""
    command = [sys.executable, __file__, "--one", json.dumps(dataclasses.asdict(point)), *shared]
    runs = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]) for _ in range(repetitions)]
    found = {name: median([r[name] for r in runs]) for name in runs[0]}
    print(f"{point}: {found['train_seconds']:.3f} s a step, {found['peak_bytes_above_the_model'] / 1e6:,.0f} MB", flush=True)
    return found


if __name__ == "__main__":
    main()
