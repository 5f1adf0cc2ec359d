"""Whether the splits of a benchmark's tasks can be made: asked before hours of training, since the sealed one is opened after them.

A process of its own makes them and forgets them, and tells nothing but what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from selfimprove import config as configuration
from selfimprove import discovery
from selfimprove.errors import SelfImproveError
from selfimprove.task import SPLITS


def undrawable(tasks: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Which of these tasks lacks a split, and why; None where all can be made. Args: tasks: configurations of tasks by what they are called."""
    asked = subprocess.run([sys.executable, "-m", "selfimprove.bench.drawing"], input=json.dumps(tasks), capture_output=True, text=True)
    told = asked.stdout.splitlines() if asked.returncode == 0 else asked.stderr.splitlines()[-1:]
    return told[0] if told else None


def wrong(tasks: Mapping[str, Mapping[str, Any]]) -> Sequence[str]:
    """What is wrong with tasks, one line for each."""
    found, told = discovery.sources(), []
    for name, node in tasks.items():
        try:
            task = configuration.instantiate(node, "task", found)
            for split in SPLITS:
                task.items(split)
        except SelfImproveError as e:
            told.append(f"{name}: {' '.join(str(e).splitlines())}")
    return told


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in wrong(json.load(sys.stdin)))
