"""DGM and HGM against their ablations on program repair. Resumable: run it again after a kill.

    python benchmarks/dgm_repair.py --seeds 3 4 5 6 7
    python benchmarks/dgm_repair.py --arms dgm greedy --children 20 --minutes 8
    python benchmarks/dgm_repair.py --seeds 3 4 5 6 7 --report
    python benchmarks/dgm_repair.py --seeds 0 --arms dgm --ranking model --children 6

Every arm makes as many children, on the same training functions, and opens the sealed functions at its end, once, for the initial agent and for the
best one: the agent with the highest 5 % quantile of its posterior on the training functions, so that a few lucky ones do not make an agent the
best. DGM has the mean of the three best scores as midpoint. Both were chosen on validation functions, with other seeds (`dgm_exploration.py`). All
seeds have the same 50 sealed functions, and no seed trains or validates on them. With --ranking uniform (the default) nobody weighs the changes of
the grammar, and no model is opened; --ranking model lets the embedded model weigh them. The result is benchmarks/results/dgm_repair.json
(with --ranking model dgm_repair_model.json) and its .svg; run folders stay under --work. --report writes the result of the runs that are finished,
and runs nothing. `_dgm_report.py` says what is in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _dgm_report import SEALED, best, finished, plot, result
from _machine import RESULTS, arguments, commit, versions

from selfimprove import config
from selfimprove.hooks import hookimpl
from selfimprove.records import Lineage, encode_evaluation
from selfimprove.session import Session
from selfimprove.storage import write_json

ARMS = {
    "dgm": ["strategy=dgm"],
    "hgm": ["strategy=hgm"],
    "no_self_modification": ["strategy=dgm", "editor.author=root"],
    "no_archive": ["strategy=dgm", "selector=no_archive"],
    "greedy": ["strategy=dgm", "selector=greedy"],
    "random": ["strategy=dgm", "selector=uniform"],
}
DEFAULTS = {"children": 80, "ranking": "uniform", "test": 50}


class Until:
    """A guard: so many children were tried, or the time of this call is over."""

    def __init__(self, children: int, end: float) -> None:
        self.children, self.end = children, end

    @hookimpl
    def should_stop(self, lineage: Lineage) -> str | None:
        if tried(lineage) >= self.children:
            return f"{self.children} children were tried"
        return "the time of this call is over" if time.monotonic() > self.end else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--children", type=int, default=DEFAULTS["children"])
    parser.add_argument("--ranking", choices=["uniform", "model"], default=DEFAULTS["ranking"])
    parser.add_argument("--test", type=int, default=DEFAULTS["test"], help="sealed functions")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop starting rounds after this long")
    parser.add_argument("--work", type=Path, default=Path("runs", "dgm_repair"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--report", action="store_true", help="run nothing; write the result of the runs that are finished")
    parser.add_argument("overrides", nargs="*", help="configuration overrides of every run")
    options = arguments(parser)
    end = time.monotonic() + 60 * options.minutes
    for seed in [] if options.report else options.seeds:
        for arm in options.arms:
            if time.monotonic() < end:
                grown(options, arm, seed, end)
    report(options)


def parts_of(options: argparse.Namespace, arm: str, seed: int) -> Any:
    ranking = ["editor.ranking=uniform", "engine=scripted"] if options.ranking == "uniform" else ["editor.ranking=model"]
    sizes = [f"task.seed={seed}", f"seed={seed}", f"task.test={options.test}"]
    return config.build(config.compose([*ARMS[arm], *ranking, *sizes, *options.overrides]))


def folder_of(options: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(options.work, f"{arm}_s{seed}_{options.ranking}_c{options.children}")


def grown(options: argparse.Namespace, arm: str, seed: int, end: float) -> None:
    """Grow a run as far as the time allows, and measure its sealed functions when it is done."""
    folder = folder_of(options, arm, seed)
    if (folder / SEALED).exists():
        return
    parts = parts_of(options, arm, seed)
    session = Session(watched(parts, [Until(options.children, end)]), folder)
    lineage = session.improve()
    print(f"{folder.name}: {tried(lineage)} children, {lineage.size} agents")
    if tried(lineage) >= options.children:
        write_json(folder / SEALED, sealed(parts, folder))


def watched(parts: Any, observers: Sequence[Any]) -> Any:
    return dataclasses.replace(parts, observers=list(observers))


def sealed(parts: Any, folder: Path) -> dict[str, Any]:
    """The sealed scores of the initial and of the best agent, by function."""
    session = Session(watched(parts, [Until(0, 0.0)]), folder, evaluation_split="test")
    try:
        lineage = session.lineage
        chosen = best(lineage)
        candidates = list({c.id: c for c in (lineage.root, chosen)}.values())
        scores = dict(session.hook.evaluate(candidates=candidates, trials=[], rewards=[], lineage=lineage, run=session.run))
    finally:
        session.close()
    return {
        "initial": encode_evaluation(scores[lineage.root.id]),
        "best": encode_evaluation(scores[chosen.id]),
        "candidate": chosen.id,
        "commit": commit(),
    }


def tried(lineage: Lineage) -> int:
    return sum(len(lineage.round(i).trials) for i in range(len(lineage)))


# ---- what came out ----


def report(options: argparse.Namespace) -> None:
    """Write the result of all runs that are finished, and print its arms and sentences."""
    wanted = [(arm, seed) for arm in options.arms for seed in options.seeds]
    runs = [run for arm, seed in wanted if (run := finished(folder_of(options, arm, seed), arm, seed))]
    found = {
        **result(runs),
        "not_finished": [f"{arm}_s{seed}" for arm, seed in wanted if not (folder_of(options, arm, seed) / SEALED).exists()],
        "command": command(options),
        "children": options.children,
        "ranking": options.ranking,
        "commit": commit(),
        "versions": versions(),
    }
    out = options.out or RESULTS / ("dgm_repair.json" if options.ranking == "uniform" else "dgm_repair_model.json")
    write_json(out, found)
    for arm, a in found["arms"].items():
        shown = (f"{w} {a[w]['score']:.3f} [{a[w]['low']:.3f}, {a[w]['high']:.3f}]" for w in ("initial", "best", "gain"))
        print(f"{arm:22s}", *shown)
    print(*found["ordering"]["words"], *found["doubled"], sep="\n")
    if runs:
        plot(runs, list(ARMS), out.with_suffix(".svg"))


def command(options: argparse.Namespace) -> list[str]:
    """The arguments that make the result, wherever its run folders lie and however many pieces it was made in."""
    given = ["--seeds", *map(str, options.seeds)]
    given += ["--arms", *options.arms] if options.arms != [*ARMS] else []
    given += [w for name in ("children", "ranking", "test") if (v := getattr(options, name)) != DEFAULTS[name] for w in (f"--{name}", str(v))]
    return [*given, *options.overrides]


if __name__ == "__main__":
    main()
