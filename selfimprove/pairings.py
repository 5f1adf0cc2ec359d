"""Which options of different roles go together, tried on the scripted model: ``python -m selfimprove.pairings > docs/pairings.md``.

Every pair runs for one round in the company of the strategy that its editor belongs to, at the size at which `selfimprove check` runs that,
or is refused; the document says which, and why.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfimprove import config as configuration
from selfimprove import discovery
from selfimprove.config import Config
from selfimprove.discovery import CORE, Option
from selfimprove.errors import SelfImproveError
from selfimprove.session import Session
from selfimprove.testing.conformance import overrides_of

TOYS = ("task=toy", "engine=toy", "grader=exact", "observer=[]", "guard=[rounds]", "guard.rounds.rounds=1")
SMALL = {"prompts": 2, "samples": 2, "contexts": 1, "edits": 2}
"""Arguments of editors that make a round short."""
ROWS = ("rewarder", "updater", "evaluator", "selector")
RUNS = "runs"
GENERAL = (
    (r"\b\w+ \((editor|rewarder|updater|evaluator|selector)\)", r"the \1"),  # the role, whatever fills it
    (r"the editor produces [\w, ]+, but the (\w+) consumes (\w+);", r"the \1 reads edits of type \2, which this editor does not write;"),
    (r"those of the editor have only [\w, ]+;", "those of this editor have none;"),
)
"""What makes one reason of several that differ in names only."""

Values = dict[str, Any]


def document() -> str:
    """The text of docs/pairings.md."""
    options = {role: list(_options(role)) for role in ("editor", *ROWS)}
    made = {(role, o.name): _compose(f"{role}={o.name}").values[role] for role, several in options.items() for o in several}
    companies = dict(_companies(options["editor"], made))
    reasons: list[str] = []
    parts = [
        "# What goes with what\n",
        "Every pair of options of two roles, tried for one round on the scripted model with the other roles of the editor's own strategy, on the "
        "toy task or, where that strategy has one of its own, on that. Editors of one class are one column (`rollouts_star` is a `rollouts`). "
        "A number stands for the reason, below, for which the pair is refused before "
        "anything starts; † marks one that is found out only in its first round. That a pair runs says that it works, not that it is wise: a "
        "reward that ignores the edit (`accept`, `chance`) is there to compare with. Written by `python -m selfimprove.pairings`.\n",
    ]
    fits: dict[str, dict[str, list[str]]] = {}
    for role in ROWS:
        rows = []
        for o in options[role]:
            found = {editor: _tried({**values, role: made[role, o.name]}) for editor, values in companies.items()}
            for editor, outcome in found.items():
                if outcome == RUNS:
                    fits.setdefault(editor, {}).setdefault(role, []).append(o.name)
            rows.append([f"`{o.name}`", *(_cell(outcome, reasons) for outcome in found.values())])
        parts.append(_table(f"{role.capitalize()}s by editor", [role, *(f"`editor={e}`" for e in companies)], rows))
    for editor, values in companies.items():
        rewarders, updaters = (fits.get(editor, {}).get(role, []) for role in ("rewarder", "updater"))
        rows = [
            [f"`{r}`", *(_cell(_tried({**values, "rewarder": made["rewarder", r], "updater": made["updater", u]}), reasons) for u in updaters)]
            for r in rewarders
        ]
        parts.append(_table(f"Rewarders by updater, with `editor={editor}`", ["rewarder", *(f"`{u}`" for u in updaters)], rows))
    parts.append("## Reasons\n\n" + "\n".join(f"{n}. {reason}" for n, reason in enumerate(reasons, 1)))
    return "\n".join(parts).rstrip() + "\n"


def _options(role: str) -> Iterator[Option]:
    """The options of a role that this project's distributions offer."""
    for source in discovery.sources():
        if source.distribution == CORE or source.distribution.startswith(f"{CORE}-"):
            yield from (o for o in source.options() if o.group == role)


def _compose(*overrides: str) -> Config:
    return configuration.compose([*TOYS, *overrides])


def _companies(editors: Sequence[Option], made: Mapping[tuple[str, str], Any]) -> Iterator[tuple[str, Values]]:
    """One editor of each class, and a configuration of the first strategy that takes it."""
    names = sorted(o.name for o in _options("strategy"))
    editor_of = {name: _compose(f"strategy={name}").choices.get("editor") for name in names}
    seen = set()
    for option in sorted(editors, key=lambda o: len(o.name)):
        target = made["editor", option.name]["_target_"]
        home = next((name for name in names if editor_of[name] == option.name), None)
        if target in seen or home is None:
            continue
        seen.add(target)
        values = copy.deepcopy(_compose(f"strategy={home}", *overrides_of(home)).values)
        values["editor"].update({k: v for k, v in SMALL.items() if k in values["editor"]})
        yield option.name, values


def _tried(values: Values) -> str:
    """``runs``, or why not; with a dagger in front where a round had begun."""
    begun = False
    try:
        parts = configuration.build(Config(values, values))
        with tempfile.TemporaryDirectory(prefix="selfimprove-pairing-") as folder:
            session = Session(parts, Path(folder))
            begun = True
            session.improve()
    except SelfImproveError as e:
        return ("†" if begun else "") + str(e).splitlines()[0]
    return RUNS


def _cell(outcome: str, reasons: list[str]) -> str:
    if outcome == RUNS:
        return RUNS
    reason = outcome.removeprefix("†")
    for pattern, general in GENERAL:
        reason = re.sub(pattern, general, reason)
    if reason not in reasons:
        reasons.append(reason)
    return f"{reasons.index(reason) + 1}{'†' if outcome.startswith('†') else ''}"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"## {title}\n", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
