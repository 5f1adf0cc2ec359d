"""`selfimprove show`: a run folder as tables and a tree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from selfimprove.journal import lineage_digest
from selfimprove.ledger import UNITS
from selfimprove.records import Candidate, Edit, Evaluation
from selfimprove.report.closing import ARM, closing_table
from selfimprove.report.forgetting import forgetting_table
from selfimprove.report.lineage import chain
from selfimprove.report.read import TRANSDUCTIVE, History, described, history, identity, judged, scored
from selfimprove.report.rewards import rewards_table
from selfimprove.report.safe import safe

ROUNDS = 50
NODES = 40
EDITS = 3
CHARACTERS = 600


def render_run(folder: Path, console: Console) -> None:
    """Print a run: its rounds, its best and worst edits, what it spent, its lineage and the closing table.

    Raises: ResumeError, where the folder holds no run.
    """
    run = history(folder)
    root, said = run.lineage.root, identity(folder)
    console.print(Text(f"{folder}: {len(run.lineage)} rounds, {run.lineage.size} candidates, lineage {lineage_digest(folder / 'journal.jsonl')}"))
    if "steered_by_labels" in said:
        steered = ", ".join(map(str, said["steered_by_labels"]))
        console.print(Text(f"labels steer it through {steered}" if steered else "label-free: nothing that trains, selects or stops reads labels"))
    if said.get("transductive"):
        console.print(Text(TRANSDUCTIVE))
    if not len(run.lineage):
        console.print(Text(f"no round is finished; the root is {_short(root.id)}. `selfimprove resume {folder}` goes on"))
    parts: list[RenderableType | None] = [
        rounds_table(run),
        rewards_table(run),
        forgetting_table(run),
        edits_table(run),
        ledger_table(run),
        lineage_tree(run),
    ]
    for part in parts if len(run.lineage) else [ledger_table(run)]:
        if part is not None:
            console.print()
            console.print(part)
    if any(m.startswith(ARM) for e in run.evaluations().values() for m in e.metrics):
        console.print()
        console.print(closing_table(folder))


def render_chain(run: History, candidate: Candidate, console: Console) -> None:
    """Print the edits that led from the root to a candidate, oldest first, each with what its candidate scored."""
    steps = chain(run.lineage, candidate.id)
    edits = "1 edit" if len(steps) == 1 else f"{len(steps)} edits"
    console.print(Text(f"{edits} led from the root {_short(run.lineage.root.id)} to {_short(candidate.id)}"))
    for number, (name, edit) in enumerate(steps, 1):
        score = run.lineage.score(name)
        console.print(Text(f"\n{number}. {_short(name)}, round {run.lineage.round_of(name) + 1}, score {_number(score)}", style="bold"))
        if why := getattr(edit.payload, "diagnosis", ""):
            console.print(safe(why, CHARACTERS))
        console.print(safe(described(edit)))


def rounds_table(run: History) -> RenderableType:
    """A row per round; of a long run, the last `ROUNDS`."""
    shown = list(enumerate(run.lineage.rounds, 1))[-ROUNDS:]
    evaluations = run.evaluations()
    metrics = list(
        dict.fromkeys(m for _, r in shown for c in r.children if c.id in evaluations for m in evaluations[c.id].metrics if not m.startswith(ARM))
    )
    table = _table("Rounds")
    for heading in ("round", "parents", "trials", "measured", "reward mean", "reward best", "child", "score"):
        table.add_column(heading, justify="left" if heading in ("parents", "child") else "right")
    for number, one in shown:
        rewards = scored(one.rewards)
        child = one.children[-1] if one.children else None
        evaluation = evaluations.get(child.id) if child else None
        table.add_row(
            str(number),
            _ids(one.parents),
            str(len(one.trials)),
            str(len(rewards)),
            _number(_mean(rewards)),
            _number(max(rewards, default=None)),
            _ids([c.id for c in one.children]),
            _number(evaluation.score if evaluation else None),
        )
    if len(run.lineage) > len(shown):
        table.caption = f"the last {len(shown)} of {len(run.lineage)} rounds"
    if not metrics:
        return table
    more = _table("What the rounds' evaluations say besides")
    more.add_column("round", justify="right")
    for metric in metrics:
        more.add_column(safe(metric.replace("_", " ")), justify="right")
    for number, one in shown:
        found = evaluations.get(one.children[-1].id) if one.children else None
        more.add_row(str(number), *(_number(found.metrics.get(m) if found else None) for m in metrics))
    return Group(table, Text(), more)


def _table(title: str) -> Table:
    """A table without vertical lines, so that it fits eighty columns."""
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def edits_table(run: History) -> RenderableType:
    """The best and the worst edits of the run side by side, by mean reward over replicates."""
    ranked: list[tuple[float, int, Edit, list[Evaluation]]] = []
    void: dict[str, int] = {}
    for number, edit, rewards in run.edits():
        values = scored(rewards)
        if values:
            ranked.append((mean(values), number, edit, rewards))
        else:
            reason = rewards[0].error or "not finite"
            void[reason] = void.get(reason, 0) + 1
    ranked.sort(key=lambda r: r[0], reverse=True)
    count = min(EDITS, len(ranked) // 2) or min(1, len(ranked))
    table = Table(title=f"Best and worst of {len(ranked)} measured edits", title_justify="left", show_lines=True)
    table.add_column("best", ratio=1)
    table.add_column("worst", ratio=1)
    for best, worst in zip(ranked[:count], list(reversed(ranked))[:count], strict=True):
        table.add_row(_edit(*best), _edit(*worst))
    if not void:
        return table
    commonest = sorted(void.items(), key=lambda kv: -kv[1])[:3]
    reasons = "; ".join(f"{count} × {reason}" for reason, count in commonest)
    return Group(table, safe(f"{sum(void.values())} edits could not be measured: {reasons}", 300))


def ledger_table(run: History) -> Table:
    """What was spent, by stage and unit, and what a judge said. `start` is what happened outside every stage."""
    totals = run.ledger.get("totals", {})
    units = [u for u in UNITS if totals.get(u)]
    table = _table("Ledger")
    table.add_column("stage", no_wrap=True)
    for unit in units:
        table.add_column(unit.replace("_", " "), justify="right", overflow="fold")
    stages = [(s, amounts) for s, amounts in run.ledger.get("by_stage", {}).items() if any(amounts.values())]
    for i, (stage, amounts) in enumerate(stages, 1):
        table.add_row(safe(stage), *(_amount(amounts.get(u, 0)) for u in units), end_section=i == len(stages))
    table.add_row("total", *(_amount(totals[u]) for u in units))
    if said := judged(run.folder):
        table.caption = said
    return table


def lineage_tree(run: History) -> Tree:
    """Candidates under their first parent, with their pooled scores; of many, the first `NODES`."""
    best = run.lineage.best()
    nodes: dict[str, Tree] = {}
    top = Tree("Lineage")
    for i, candidate in enumerate(run.lineage):
        if i == NODES:
            top.add(f"… and {run.lineage.size - NODES} more")
            break
        above = nodes.get(candidate.parents[0], top) if candidate.parents else top
        nodes[candidate.id] = above.add(_node(run, candidate, best))
    return top


def _node(run: History, candidate: Candidate, best: Candidate | None) -> Text:
    number = run.lineage.round_of(candidate.id) + 1
    score = run.lineage.score(candidate.id)
    label = Text(f"{_short(candidate.id)}  {'root' if number == 0 else f'round {number}'}")
    label.append("" if score is None else f"  score {score:.4g}")
    if len(candidate.parents) > 1:
        label.append(f"  also from {_ids(candidate.parents[1:])}")
    if best is not None and candidate.id == best.id:
        label.append("  best", style="bold green")
    return label


def _edit(value: float, number: int, edit: Edit, rewards: Sequence[Evaluation]) -> Text:
    each = ", ".join(_number(r.score) for r in rewards)
    head = f"reward {_number(value)}" + (f" (of {each})" if len(rewards) > 1 else "") + f", round {number}"
    return Text.assemble((head, "bold"), "\n", safe(described(edit), CHARACTERS))


def _ids(ids: Sequence[str]) -> str:
    shown = ", ".join(_short(i) for i in ids[:3])
    return escape(shown + (f" +{len(ids) - 3}" if len(ids) > 3 else ""))


def _short(digest: str) -> str:
    return safe(digest[:8]).plain


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None  # exact, so that no sum of large values overflows


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _amount(value: float) -> str:
    if value == 0:
        return ""
    if value >= 1e6:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
