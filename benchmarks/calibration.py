"""How far the statistics of `selfimprove bench` can be believed: simulated suites whose truth is known. No model; five minutes on one core.

    python benchmarks/calibration.py

Every simulated suite has two arms, five seeds and graded questions (right or wrong), with a difficulty of each question, an effect of each
seed on each arm, and either questions of its own for every seed or the same for all. It says

* ``null_called_no_difference``: of suites whose arms are identical, the share in which neither is called better (1 minus the false positives);
* ``power_promised`` and ``power_found``: the mean probability that a suite reports for finding the planted effect, and how often suites with that
  effect find it; ``widest_power_gap``: how far these two are apart in the setting where they are furthest;
* ``after_more_seeds``: how often it is found by suites that were given as many more seeds as a first suite asked for, to find it with probability .8.

The result is benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from selfimprove.bench.inference import ALPHA, POWER, Difference, Grades, difference, more_seeds, power
from selfimprove.discovery import version_of
from selfimprove.storage import write_json

SEEDS = 5
SETTINGS: dict[str, dict[str, Any]] = {
    "own_items": {"items": 48, "seed_noise": 0.03, "shared": False, "effect": 0.18},
    "shared_items": {"items": 48, "seed_noise": 0.03, "shared": True, "effect": 0.12},
    "noisy_seeds": {"items": 48, "seed_noise": 0.10, "shared": False, "effect": 0.20},
    "many_items": {"items": 200, "seed_noise": 0.05, "shared": False, "effect": 0.12},
    "quiet": {"items": 200, "seed_noise": 0.0, "shared": True, "effect": 0.05},
}


def suite(rng: np.random.Generator, seeds: int, effect: float, items: int, seed_noise: float, shared: bool) -> tuple[Grades, Grades]:
    """The grades of two arms, the first better by `effect` on average.

    A question's difficulty, an arm's luck in a seed and an arm's liking for a question move the probability of a right answer.
    """
    easy = rng.uniform(0.3, 0.7, size=items)
    liking = rng.normal(0, 0.05, size=(2, items))
    arms: list[dict[int, dict[str, float]]] = [{}, {}]
    for seed in range(seeds):
        if not shared:
            easy, liking = rng.uniform(0.3, 0.7, size=items), rng.normal(0, 0.05, size=(2, items))
        for arm, gain in enumerate((effect / 2, -effect / 2)):
            chance = np.clip(easy + liking[arm] + gain + rng.normal(0, seed_noise), 0, 1)
            right = (rng.random(items) < chance).astype(float)
            arms[arm][seed] = {f"{'' if shared else seed}/{i}": float(g) for i, g in enumerate(right)}
    return {"task": arms[0]}, {"task": arms[1]}


def measured(setting: str, suites: int) -> dict[str, Any]:
    """What the statistics say of so many suites of a setting."""
    known = dict(SETTINGS[setting])
    effect = known.pop("effect")
    rng = np.random.default_rng(list(setting.encode()))

    def differences(seeds: int, planted: float) -> Iterator[Difference]:
        for _ in range(suites):
            yield difference(*suite(rng, seeds, planted, **known))

    null = list(differences(SEEDS, 0.0))
    planted = list(differences(SEEDS, effect))
    asked = [more_seeds(effect / 2, d) for d in planted[:: max(1, suites // 200)]]  # what a suite too small for half the effect asks for
    more = [difference(*suite(rng, SEEDS + n, effect / 2, **known)) for n in asked if n is not None]
    return {
        **SETTINGS[setting],
        "suites": suites,
        "seeds": SEEDS,
        "null_called_no_difference": float(np.mean([d.p >= ALPHA for d in null])),
        "null_interval_holds_zero": float(np.mean([d.low <= 0 <= d.high for d in null])),
        "interval_holds_effect": float(np.mean([d.low <= effect <= d.high for d in planted])),
        "power_promised": float(np.mean([power(effect, d) for d in planted])),
        "power_found": float(np.mean([d.p < ALPHA and d.estimate > 0 for d in planted])),
        "half_effect": effect / 2,
        "more_seeds_asked": float(np.median([n for n in asked if n is not None])) if more else None,
        "after_more_seeds": float(np.mean([d.p < ALPHA and d.estimate > 0 for d in more])) if more else None,
        "after_more_seeds_promised": POWER,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        found = dict(zip(SETTINGS, pool.map(measured, SETTINGS, [options.suites] * len(SETTINGS)), strict=True))
    mean = {k: float(np.mean([f[k] for f in found.values()])) for k in ("null_called_no_difference", "power_promised", "power_found")}
    made = {
        **mean,
        "least_null_called_no_difference": min(f["null_called_no_difference"] for f in found.values()),
        "widest_power_gap": max(abs(f["power_promised"] - f["power_found"]) for f in found.values()),
        "settings": found,
        "versions": {p: version_of(p) for p in ("selfimprove", "numpy", "scipy")},
        "command": sys.argv[1:],
    }
    write_json(options.out, made)
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
