"""Tables of result files: what the pages say of a measurement is read from it when the site is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Result:
    """A result file that a page shows, and where its numbers stand in it."""

    name: str
    title: str
    command: str
    columns: Mapping[str, str]
    """Heading of each column, and the path of its value inside an arm: ``pass_at_1``. An interval or standard error is shown with it."""
    under: str = "arms"
    rows: Mapping[str, str] = field(default_factory=dict)
    """Names of arms as a reader knows them; all arms are shown, in this order first."""


SEAL_ARMS = {
    "untouched": "untouched model",
    "passage": "passage",
    "passage_equal_tokens": "passage, for as many trained tokens",
    "edits": "untrained edits",
    "round_1": "SEAL, one round",
    "round_2": "SEAL, two rounds",
    "seal_tools_edits": "untrained tool calls",
    "seal_tools_round_1": "tool calls, one round",
    "seal_tools_round_2": "tool calls, two rounds",
    "gold": "gold pairs (oracle)",
}

MEASURED: dict[str, tuple[Result, ...]] = {
    "seal": (
        Result(
            "seal_knowledge.json",
            "closed-book accuracy on sealed people",
            "python benchmarks/seal_knowledge.py --seeds 0 1 2 --train 60 --test 60 --tools-train 20",
            {"accuracy": "accuracy"},
            rows=SEAL_ARMS,
        ),
        Result(
            "seal_squad.json",
            "closed-book accuracy on sealed passages, one seed",
            "python benchmarks/seal_knowledge.py --squad FILE --train 60 --test 60 --tools-train 0",
            {"accuracy": "accuracy"},
            rows=SEAL_ARMS,
        ),
    ),
    "srt": (
        Result(
            "srt_arithmetic.json",
            "products, sealed questions",
            "python benchmarks/srt_arithmetic.py --seeds 0 1 2",
            {"pass@1": "pass_at_1", "pass@8": "pass_at_8"},
            rows={
                "untrained": "untrained, temperature 1",
                "untrained_greedy": "untrained, greedy",
                "majority": "untrained, majority of 8",
                "srt": "SRT",
            },
        ),
        Result(
            "collapse.json",
            "a run that collapses, and what guards keep, sums and differences, three seeds",
            "python benchmarks/collapse.py --seeds 0 1 2 --runs unguarded stop fallback gap_stop labelled_early_stop",
            {"reward of the last rollouts": "last_reward", "right of them": "last_truth", "pass@1 of what is kept": "truth"},
            under="",
        ),
        Result(
            "collapse_products.json",
            "the same on products, with what mitigates a collapse without a guard",
            "python benchmarks/collapse.py --seeds 0 1 2 --work runs/collapse_products --out benchmarks/results/collapse_products.json "
            "task.family=products 'task.levels=[{min_digits:1,max_digits:1},{min_digits:1,max_digits:2}]'",
            {"reward of the last rollouts": "last_reward", "right of them": "last_truth", "pass@1 of what is kept": "truth"},
            under="",
        ),
    ),
    "dgm": (
        Result(
            "dgm_repair.json",
            "share of sealed functions that an agent repairs, 80 children, five seeds",
            "python benchmarks/dgm_repair.py --seeds 3 4 5 6 7",
            {"initial agent": "initial", "best agent": "best", "gain": "gain"},
            rows={"dgm": "DGM", "hgm": "HGM"},
        ),
    ),
    "evolution": (
        Result(
            "es_arithmetic.json",
            "products, sealed questions, at the same FLOPs",
            "python benchmarks/es_arithmetic.py --seeds 0 1 2 engine.threads=1",
            {"pass@1": "pass_at_1", "pass@8": "pass_at_8"},
            rows={"untrained": "untrained, temperature 1", "untrained_greedy": "untrained, greedy", "es": "ES", "eggroll": "EGGROLL"},
        ),
        Result(
            "es_throughput.json",
            "tokens a second beside plain inference",
            "python benchmarks/es_throughput.py",
            {"share or ratio": ""},
            under="keys",
        ),
    ),
}
"""Which results belong to which plugin."""


def table(result: Mapping[str, Any], shown: Result) -> Iterator[str]:
    """One row for each arm."""
    paths = set(shown.columns.values())
    found = result[shown.under] if shown.under else {k: v for k, v in result.items() if isinstance(v, Mapping) and paths <= v.keys()}
    if not found:
        raise ValueError(f"{shown.name} has nothing with {', '.join(sorted(paths))}; name in docgen/results.py what it has")
    names = [*(n for n in shown.rows if n in found), *(n for n in found if n not in shown.rows and not _twin(n, found, shown))]
    yield f"| | {' | '.join(shown.columns)} |"
    yield f"|---|{'---|' * len(shown.columns)}"
    for name in names:
        yield f"| {shown.rows.get(name, name.replace('_', ' '))} | {' | '.join(cell(found[name], path) for path in shown.columns.values())} |"


def cell(arm: Any, path: str) -> str:
    """A value with its interval or standard error, as far as the file has them."""
    value = arm[path] if path else arm
    if isinstance(value, Mapping):
        middle = value.get("mean", value.get("score"))
        return f"{_number(middle)} [{_number(value['low'])}, {_number(value['high'])}]"
    error = arm.get("standard_error") if isinstance(arm, Mapping) else None
    return _number(value) + (f" ± {_number(error)}" if error is not None else "")


def _twin(name: str, found: Mapping[str, Any], shown: Result) -> bool:
    """Whether an arm without a name of its own repeats one that has one."""
    return any(found[name] == found[other] for other in shown.rows if other in found)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3f}"
