"""What can be said about a plugin without running it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

from selfimprove import hooks

HEAVY = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "vllm", "tensorflow", "jax", "pandas", "scipy", "sklearn", "matplotlib")
"""Libraries whose import takes seconds."""


def unknown_arguments(cls: type[Any]) -> list[str]:
    """For each argument that a hook of the class names and is never given, a message."""
    known = {n: set(inspect.signature(f).parameters) for spec in hooks.SPECS for n, f in vars(spec).items() if hasattr(f, f"{hooks.PROJECT}_spec")}
    found = []
    for name in dir(cls):
        function = getattr(cls, name, None)
        if function is None or not hasattr(function, f"{hooks.PROJECT}_impl"):
            continue
        if name not in known:
            found.append(f"{cls.__name__}.{name} is no hook; the hooks are {', '.join(known)}")
            continue
        strange = [n for n, p in inspect.signature(function).parameters.items() if n not in known[name] and p.default is p.empty]
        found += [f"{cls.__name__}.{name} wants {n!r}; it may name {', '.join(sorted(known[name] - {'self'}))}" for n in strange]
    return found


def heavy_imports(modules: Sequence[str]) -> list[str]:
    """The slow libraries that importing these modules brings, and importing the core's public modules does not; in a process of its own."""
    return list(_heavy_imports(tuple(modules), tuple(sys.path)))


@cache  # the plugins of a module ask the same, and a process that imports takes seconds
def _heavy_imports(modules: tuple[str, ...], path: tuple[str, ...]) -> list[str]:
    program = (
        "import importlib, json, sys\n"
        "import selfimprove, selfimprove.hooks, selfimprove.models, selfimprove.graders, selfimprove.policy_gradient, selfimprove.rollouts\n"
        "before = set(sys.modules)\n"
        "modules, heavy = json.loads(sys.argv[1])\n"
        "for name in modules: importlib.import_module(name)\n"
        "print(json.dumps([h for h in heavy if h in sys.modules and h not in before]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([modules, HEAVY])], capture_output=True, text=True, env=_environment(), check=False
    )
    if done.returncode:
        raise AssertionError(f"{', '.join(modules)} cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    """This process's environment, with the folders that it imports from."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
