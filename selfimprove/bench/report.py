"""The report of a benchmark: Markdown, and one HTML file that needs no network, from its result alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from selfimprove.bench import charts, trees
from selfimprove.bench.verdicts import cautions, compared, sentences, short, summaries
from selfimprove.storage import write_bytes

MARKDOWN, HTML = "report.md", "report.html"


def write(result: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Write the report in both forms; the lines to show in a terminal."""
    write_bytes(folder / MARKDOWN, markdown(result).encode(errors="replace"))
    write_bytes(folder / HTML, html(result).encode(errors="replace"))
    yield from sentences(result)
    yield from cautions(result)
    yield f"report {folder / HTML}"


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown: verdicts, cautions, the arms, the comparisons."""
    lines = [f"# {result['suite']}", "", str(result["about"]), "", *(f"- {s}" for s in sentences(result)), ""]
    lines += [*(f"- {s}" for s in cautions(result)), "", *table(result), ""]
    rows = comparisons(result)
    if rows:
        lines += [_row(COMPARED), f"|{'---|' * len(COMPARED)}", *map(_row, rows), ""]
        lines += [NOTE.format(effect=result["effect"]), ""]
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The arms as a Markdown table, by task."""
    unit = result["unit"]
    yield _row(("task", "arm", "sealed test", "pass@k", unit, "seeds"))
    yield "|---|---|---|---|---|---|"
    for a in result["arms"]:
        score = _number(a["score"]) + ("" if a["standard_error"] is None else f" ± {a['standard_error']:.3f}")
        spent = "–" if a["spent"] is None else f"{a['spent']:.3g}"
        done = sum(c["score"] is not None for c in a["cells"])
        most = max((int(m.removeprefix("pass_at_")) for m in _passes([a])), default=0)
        passed = f"{a['metrics'][f'pass_at_{most}']:.3f} (k = {most})" if most else ""
        yield _row((a["task"], short(a["name"]), score, passed, spent, str(done)))


def _row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(c.replace('|', chr(92) + '|') for c in cells)} |"


COMPARED = ("comparison", "task", "difference", "95 % interval", "corrected p", "probability of improvement", "power", "verdict")
"""The columns of `comparisons`."""
NOTE = (
    "Paired differences over seeds and items. Intervals are of each comparison alone; p and the verdicts are corrected for their number. "
    "The probability of improvement is that of one seed beating another; the power, that of finding a difference of {effect:g}."
)
"""What stands below the comparisons."""


def comparisons(result: Mapping[str, Any]) -> list[list[str]]:
    """Every comparison as a row of texts. The power is that of finding the difference that matters."""
    rows = []
    for c in result["comparisons"]:
        row = [f"{short(c['one'])} − {short(c['other'])}", ", ".join(c["tasks"])]
        if "difference" in c:
            row += [f"{c['difference']:+.3f}", f"{c['low']:+.3f} to {c['high']:+.3f}", f"{c['p_holm']:.2g}"]
            row += [f"{c['probability_of_improvement']:.2f}", f"{c['power']:.2f}"]
            verdict = c["verdict"] + (f", about {c['more_seeds']} more seeds" if c["more_seeds"] else "")
        else:
            row += ["–"] * 5
            verdict = c["verdict"]
        rows.append([*row, verdict])
    return rows


def html(result: Mapping[str, Any]) -> str:
    """The report as one HTML page. What models wrote and files say is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    arms = result["arms"]
    unit = result["unit"]
    costs = [(_title(result, a), _by_stage(a, unit)) for a in arms if a["trained"]]
    return template.render(
        r=result,
        unit=unit,
        several=len(result["budgets"]) > 1,
        given=_given(result),
        summaries=list(summaries(result)),
        verdicts=[(verdict.replace(" ", "-"), told) for verdict, told in compared(result)],
        cautions=list(cautions(result)),
        forest=_forest(result),
        compared=COMPARED,
        note=NOTE.format(effect=result["effect"]),
        comparisons=[(c["verdict"].replace(" ", "-"), row) for c, row in zip(result["comparisons"], comparisons(result), strict=True)],
        passes=_passes(arms),
        curves=[(t, _curves(result, t, unit)) for t in dict.fromkeys(a["task"] for a in arms)],
        stages=list(dict.fromkeys(s for _, by in costs for s in by)),
        costs=costs,
        most=max((math.fsum(by.values()) for _, by in costs), default=0.0) or 1.0,
        truths=[(_title(result, a), chart) for a in arms if (chart := _truth(a))],
        edited=[(_title(result, a), edits) for a in arms if (edits := _edits(a))],
        lineages=[(t, *drawn) for t in result["budgets"] if (drawn := _lineages(result, t))],
        first={a["task"]: short(a["name"]) for a in reversed(arms)},
        short=short,
        number=_number,
    )


def _title(result: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    several = len(result["budgets"]) > 1
    return short(arm["name"]) + (f" on {arm['task']}" if several else "")


def _given(result: Mapping[str, Any]) -> str:
    """What every trained arm may spend."""
    budgets, unit = result["budgets"], result["unit"]
    if len(set(budgets.values())) == 1:
        return f"{next(iter(budgets.values())):.3g} {unit}"
    return ", ".join(f"{amount:.3g} {unit} on {task}" for task, amount in budgets.items())


def _edits(arm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best and the worst edit of an arm, over all seeds."""
    found = [{**e, "seed": c["seed"]} for c in arm["cells"] for e in c["edits"] if e["reward"] is not None]
    if not found:
        return []
    ranked = sorted(found, key=lambda e: float(e["reward"]))
    return [{**ranked[-1], "which": "best"}, {**ranked[0], "which": "worst"}]


def _lineages(result: Mapping[str, Any], task: str) -> tuple[str, list[tuple[Mapping[str, Any], list[tuple[str, str]]]]] | None:
    """What the colours mean, and for each trained arm of a task the caption and tree of every seed, the best first; None without any."""
    arms = [(a, cells) for a in result["arms"] if a["task"] == task and (cells := [c for c in a["cells"] if len(c["lineage"]) > 1])]
    if not arms:
        return None
    scores = [s for _, cells in arms for c in cells for s in trees.scores(c["lineage"])]
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    drawn = []
    for arm, cells in arms:
        ordered = sorted(cells, key=lambda c: max(trees.scores(c["lineage"]), default=-math.inf), reverse=True)
        drawn.append((arm, [(_kin(c), trees.tree(c["lineage"], low, high)) for c in ordered]))
    return trees.legend(low, high), drawn


def _kin(cell: Mapping[str, Any]) -> str:
    """The caption of a tree."""
    members, scores = cell["lineage"], trees.scores(cell["lineage"])
    said = f"seed {cell['seed']}: {cell['candidates']} candidates"
    if cell["candidates"] > len(members):
        said += f", the first {len(members)} drawn"
    if not scores:
        return f"{said}, none with a score"
    root = "" if members[0][2] is None else f", the root {members[0][2]:.3f}"
    return f"{said}; the best (ringed) has {max(scores):.3f} on validation{root}"


def _passes(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that are pass@k, by k."""
    found = {m for a in arms for m in a["metrics"] if m.startswith("pass_at_") and m.removeprefix("pass_at_").isdigit()}
    return sorted(found, key=lambda m: int(m.removeprefix("pass_at_")))


def _forest(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(tasks, chart) of the differences that were measured."""
    rows: dict[str, list[tuple[str, float, float, float, str]]] = {}
    for c in result["comparisons"]:
        if "difference" in c:
            told = c["verdict"] if c["verdict"] in ("better", "worse") else ""
            found = (f"{short(c['one'])} − {short(c['other'])}", c["difference"], c["low"], c["high"], told)
            rows.setdefault(", ".join(c["tasks"]), []).append(found)
    return [(tasks, charts.intervals(found)) for tasks, found in rows.items()]


def _curves(result: Mapping[str, Any], task: str, unit: str) -> str:
    """The best validation score so far over what was spent: the mean over seeds, and its standard error."""
    arms = [a for a in result["arms"] if a["task"] == task]
    drawn = [charts.Line(short(a["name"]), points) for a in arms if a["trained"] and (points := _curve(a, unit))]
    ends = [p[0] for line in drawn for p in line.points]
    for a in arms:
        last = [c["curve"][-1][1] for c in a["cells"] if c["curve"] and c["curve"][-1][1] is not None]
        if not a["trained"] and last and ends:
            level = math.fsum(last) / len(last)
            drawn.append(charts.Line(short(a["name"]), [(min(ends), level, 0.0), (max(ends), level, 0.0)], dashed=True))
    return charts.lines(drawn, unit, "validation")


def _curve(arm: Mapping[str, Any], unit: str) -> list[tuple[float, float, float]]:
    steps = [[(t.get(unit, 0.0), best) for t, best in c["curve"] if best is not None] for c in arm["cells"]]
    steps = [s for s in steps if s]
    points = []
    begin = max((s[0][0] for s in steps), default=0.0)
    for x in sorted({x for s in steps for x, _ in s if x >= begin}):  # from where every seed has a score
        values = [max(best for at, best in s if at <= x) for s in steps]
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) if len(values) > 1 else 0.0
        points.append((x, mean, spread))
    return points


def _truth(arm: Mapping[str, Any]) -> str:
    """The mean reward of every round, and how often what was rewarded is right; empty where no monitor saw it."""
    drawn = []
    for key, name in (("reward", "reward"), ("truth_accuracy", "truth")):
        rounds: dict[int, list[float]] = {}
        for c in arm["cells"]:
            for one in c["rounds"]:
                if one.get(key) is not None:
                    rounds.setdefault(one["round"], []).append(one[key])
        drawn.append(charts.Line(name, [(float(n), math.fsum(v) / len(v), 0.0) for n, v in sorted(rounds.items())], dashed=key == "reward"))
    return charts.lines(drawn, "round", "mean") if drawn[1].points else ""


def _by_stage(arm: Mapping[str, Any], unit: str) -> dict[str, float]:
    """What each stage cost, the mean over seeds."""
    done = [c["by_stage"] for c in arm["cells"] if c["by_stage"]]
    stages = dict.fromkeys(s for by in done for s in by)
    return {s: mean for s in stages if (mean := math.fsum(by.get(s, {}).get(unit, 0.0) for by in done) / len(done))}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
