"""The sentences that a report begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfimprove.bench.suite import AT_EQUAL_COST

DECODED = {
    "greedy": "the untouched model (greedy)",
    "best_temperature": "the untouched model (best temperature)",
    "majority": "the untouched model (majority of its samples)",
    "best_of_n": "the untouched model (likeliest of its samples)",
    "supervised": "supervised training on the true labels",
}


WAITS = "not run yet"
"""The reason of a cell that has not been run."""
SHORT = {
    "greedy": "untouched, greedy",
    "best_temperature": "untouched, best temperature",
    "majority": "untouched, majority (maj@k)",
    "best_of_n": "untouched, best of n",
    "supervised": "supervised, true labels",
}


def called(name: str) -> str:
    """What a sentence calls an arm."""
    return DECODED.get(name, name.replace("_", " "))


def short(name: str) -> str:
    """What a table calls an arm."""
    return SHORT.get(name, name.replace("_", " "))


def sentences(result: Mapping[str, Any]) -> Iterator[str]:
    """One sentence about each strategy, then those about the comparisons."""
    yield from summaries(result)
    yield from (told for _, told in compared(result))


def compared(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Verdict and sentence for each comparison, or for all that lack the same."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for n, c in enumerate(result["comparisons"]):
        groups.setdefault((tuple(c["tasks"]), c["reason"]) if c["verdict"] == "missing" else n, []).append(c)
    for several in groups.values():
        one, tasks = several[0], several[0]["tasks"]
        if len(several) == 1:
            yield one["verdict"], sentence(one, result)
            continue
        every = all(c in several for c in result["comparisons"] if c["tasks"] == tasks)
        pairs = "any two arms" if every else "; ".join(f"{called(c['one'])} and {called(c['other'])}" for c in several)
        yield one["verdict"], f"On {_and(tasks)} there is nothing to compare between {pairs}: {one['reason']}."


def summaries(result: Mapping[str, Any]) -> Iterator[str]:
    """One sentence about each strategy and its null arms, at each budget."""
    several = len(result["budgets"]) > 1
    for strategy, tasks in dict.fromkeys((c["one"], tuple(c["tasks"])) for c in result["comparisons"]):
        own = [c for c in result["comparisons"] if (c["one"], tuple(c["tasks"])) == (strategy, tasks)]
        yield (f"On {_and(tasks)}, " if several else "") + summary(strategy, [c for c in own if c["null"]])


def summary(strategy: str, nulls: list[Mapping[str, Any]]) -> str:
    """Whether a strategy beats all of its null arms."""
    if not nulls:
        return f"{called(strategy)} was compared with no null arm."
    kinds: dict[str, list[str]] = {}
    for c in nulls:
        verdict = c["verdict"] if c["verdict"] in ("better", "worse", "invalid", "missing") else "open"
        kinds.setdefault(verdict, []).append(called(c["other"]))
    if list(kinds) == ["better"]:
        return f"{called(strategy)} is better than every null arm: {_and(kinds['better'])}."
    if list(kinds) == ["missing"]:
        return f"{called(strategy)} has no result to compare with a null arm."
    said = {
        "better": "is better than {}",
        "worse": "is worse than {}",
        "open": "is not shown to differ from {}",
        "invalid": "cannot be compared with {}",
        "missing": "has no result to compare with {}",
    }
    return f"{called(strategy)} {'; it '.join(text.format(_and(kinds[k])) for k, text in said.items() if k in kinds)}."


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def sentence(c: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What one comparison of a result says."""
    one, other, effect = called(c["one"]), called(c["other"]), result["effect"]
    if len(result["budgets"]) > 1:
        one = f"On {_and(c['tasks'])}, {one}"
    if c["verdict"] == "invalid":
        return f"{one} against {other}: invalid, because {c['reason']}."
    if c["verdict"] == "missing":
        return f"{one} against {other}: nothing to compare; {c['reason']}."
    numbers = f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}], {c['seeds']} seeds, corrected p {c['p_holm']:.2g}"
    match c["verdict"]:
        case "better" | "worse":
            return f"{one} is {c['verdict']} than {other}: {numbers}."
        case "no difference":
            return f"{one} and {other} do not differ by {effect:g} or more: {numbers}."
        case "underpowered":
            more = c["more_seeds"]
            needed = f"about {more} more {'seed is' if more == 1 else 'seeds are'}"
            if more is None:  # 2.8 standard errors are what a difference needs to be found with probability .8
                needed = (
                    "more items, not seeds, are"
                    if effect < 2.8 * c["item_error"]
                    else f"hundreds of seeds, or more items in each of the {c['seeds']}, are"
                )
            return f"{one} against {other}: underpowered; {needed} needed to find a difference of {effect:g} ({numbers})."
        case _:
            return (
                f"{one} is not shown to differ from {other}: {numbers}; a difference of {effect:g} would be found with probability {c['power']:.2f}."
            )


def cautions(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader has to know before believing the rest."""
    pieces = result["pieces"]
    yield from _opened(pieces)
    if len(pieces) > 1 and _items_in_common(result):
        yield "PEEKED: pieces have sealed questions in common, so whoever ran a later one could have chosen it by the earlier ones."
    yield from _mixed(pieces)
    if len(pieces) > 1:
        yield f"Made of {len(pieces)} pieces under one suite, each measured on its own; whoever ran a later one could have seen the earlier ones."
    yield from _shortfalls(result)
    for a in result["arms"]:
        if a.get("transductive"):
            yield f"TRANSDUCTIVE: {short(a['name'])} trained on the sealed questions of {a['task']}, without their answers; others never saw them."
    if waiting := [f for f in result["failures"] if f["reason"] == WAITS]:
        yield f"UNFINISHED: {len(waiting)} cell{'s have' if len(waiting) > 1 else ' has'} not been run yet."
    for f in result["failures"]:
        if f["reason"] == WAITS:
            continue
        yield f"FAILED: {f['task']}/{f['arm']}, seed {f['seed']}: {f['reason']}."
    for what, why in result["left_out"].items():
        yield f"Left out: {what}, because {why}."


def _opened(pieces: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """When the sealed test of every piece was opened."""
    once = []
    for piece in pieces:
        openings, of = piece["openings"], f" of {_seeds([piece])}" if len(pieces) > 1 else ""
        if not openings:
            yield f"The sealed test{of} was not opened: there are no results yet."
        elif len(openings) > 1:
            dates = ", ".join(o["at"] for o in openings)
            yield f"PEEKED: the sealed test{of} was opened {len(openings)} times ({dates}); what came after the first may have been chosen by it."
        else:
            once.append(piece)
        if peeked := [k for o in openings for k in o["peeked"]]:
            yield f"PEEKED: the test of {len(peeked)} cells{of} had been measured by somebody before the benchmark opened it ({', '.join(peeked)})."
    if len(pieces) == len(once) == 1:
        [opening] = once[0]["openings"]
        yield f"The sealed test was opened once, on {opening['at']}, for all {len(opening['cells'])} cells together."
    elif once:
        dates = "; ".join(f"{_seeds([piece])} on {piece['openings'][0]['at']}" for piece in once)
        yield f"The sealed test was opened once for all cells of a piece together: {dates}."


def _mixed(pieces: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether cells were run with more than one commit, or version of a package."""
    found = [{"commit": p["commit"] or "", **p["versions"]} for p in pieces]
    mixed = [p for p, told in zip(pieces, found, strict=True) if any(", " in v for v in told.values())]
    if len(pieces) == 1 and mixed:
        several = [f"{name} {v}" for name, v in found[0].items() if ", " in v]
        yield f"The cells were not all run with one commit and the same versions: {'; '.join(several)}."
    elif mixed:
        yield f"The cells of {_seeds(mixed)} were not all run with one commit and the same versions; the end of the report says with which."
    elif len({str(told) for told in found}) > 1:
        yield "The pieces were not made with one commit and the same versions; the end of the report says with which."


def _seeds(pieces: Sequence[Mapping[str, Any]]) -> str:
    return _and([f"seed {s}" for piece in pieces for s in piece["seeds"]])


def _shortfalls(result: Mapping[str, Any]) -> Iterator[str]:
    """The untouched arms that may sample for the whole budget, and spent clearly less."""
    for a in result["arms"]:
        if a["kind"] not in AT_EQUAL_COST or a["spent"] is None:
            continue
        share, samples = a["spent"] / result["budgets"][a["task"]], a["metrics"].get("samples")
        most = a["differs"].get("evaluator.most") or result["base"][a["task"]].get("evaluator.most")
        if share * (1 + result["tolerance"]) < 1 and samples is not None:
            limit = ", the most that it may (evaluator.most)" if most is not None and samples >= most else ""
            yield f"{short(a['name'])} took {samples:.3g} samples of each question of {a['task']}{limit}, for {share:.0%} of the budget."


def _items_in_common(result: Mapping[str, Any]) -> bool:
    """Whether two pieces measured the same item of the same split."""
    of = {s: i for i, piece in enumerate(result["pieces"]) for s in piece["seeds"]}
    seen: dict[tuple[str, str], int] = {}
    return any(
        seen.setdefault((a["task"], item), of[c["seed"]]) != of[c["seed"]] for a in result["arms"] for c in a["cells"] for item in c["per_item"]
    )
