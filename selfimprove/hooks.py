"""The hooks: start here.

One round of every strategy is six verbs over a lineage L (`loop.improve` is this box, line by line):

    P = select(L)        parents, drawn from everything made so far
    E = propose(P)       edits the parents would make to themselves
    T = apply(E)         the candidate each edit would make ("trial")
    R = reward(T)        what the strategy optimises
    C = update(T, R)     the candidates it makes of that
    S = evaluate(C)      what we believe candidates are worth
    L = L + (P, T, R, C, S)

A plugin is any object whose methods carry `hookimpl`. It fills one role; a method names only the arguments it
uses, and returns None to leave the answer to the default (`defaults.py`). Results are checked by
`contracts.py`. What a plugin may ask of the run is `run.Run`. Installing a plugin changes nothing: the configuration
names the one object per role, the wrappers around them (`@hookimpl(wrapper=True)`) and the observers.

Attributes that a plugin may declare:

* ``consumes`` / ``produces``: payload types, as tuples of classes; a combination whose sides do not meet is refused.
* ``uses_labels``: True where the plugin reads `run.task.labels`; without it, asking for a label raises.
* ``needs``: parts of a candidate that it reads, such as ``("policy",)``.
* ``gives_credit``: True for a rewarder that gives a credit for every token or step (`Evaluation.credit`).
* ``keeps_trials``: True for an updater whose candidates are trials as they are, so that the next round edits what `apply` made.
* ``check_roles(roles)``: a method that raises `AdmissionError` where the other roles, by name, do not suit it; it is asked before anything starts.
* ``expected(run)``: a method that `selfimprove plan` asks what a round costs: roughly, a mapping from units of the ledger.

The hooks have a version, `API`, which a distribution names in its entry points (``[project.entry-points."selfimprove.api"]``,
``hooks = "v1"``). A new hook, or a new argument of one, leaves it as it is: a plugin never has to name an argument. What takes something
away or gives it another meaning raises it, after a release in which the old way still works and warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import pluggy

from selfimprove.discovery import API as API
from selfimprove.records import Candidate, Edit, Evaluation, Lineage, Trial

if TYPE_CHECKING:
    from selfimprove.run import Run

PROJECT = "selfimprove"
DEPRECATED: dict[tuple[str, str], str] = {}
"""What is asked for instead of an argument that is going to be taken away, by (hook, argument)."""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Scores = Sequence[tuple[str, Evaluation]]


class Preparation:
    """Once, before the first round. Any role may implement it; the first that answers is taken."""

    @hookspec(firstresult=True)
    def prepare(self, root: Candidate, run: Run) -> Candidate | None:
        """The candidate to start from (warm starts, offline labels). Default: the root."""


class Selector:
    @hookspec(firstresult=True)
    def select(self, lineage: Lineage, run: Run) -> Sequence[Candidate] | None:
        """The parents of this round, at least one, all members of the lineage. Required."""


class Editor:
    @hookspec(firstresult=True)
    def propose(self, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit] | None:
        """The edits that the parents would make to themselves; may be none. Required."""

    @hookspec(firstresult=True)
    def apply(self, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial] | None:
        """The trials of the edits, in the order of the edits. Default: one trial per edit, on its first parent."""


class Rewarder:
    @hookspec(firstresult=True)
    def reward(self, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation] | None:
        """One evaluation per trial, in order; score None for what cannot be measured. Required."""


class Updater:
    @hookspec(firstresult=True)
    def update(self, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate] | None:
        """The new candidates; may be none. Default: every measurable trial becomes a child."""


class Evaluator:
    @hookspec(firstresult=True)
    def evaluate(
        self,
        candidates: Sequence[Candidate],
        trials: Sequence[Trial],
        rewards: Sequence[Evaluation],
        lineage: Lineage,
        run: Run,
    ) -> Scores | None:
        """Pairs (candidate id, evaluation) for `candidates` or any member of the lineage. Default: no scores."""


class Observer:
    """Passive: an observer sees everything and changes nothing."""

    @hookspec(historic=True)
    def setup(self, run: Run) -> None:
        """The run is about to start or to go on."""

    @hookspec(firstresult=True)
    def should_stop(self, lineage: Lineage, run: Run) -> str | None:
        """The reason to stop before another round, or None to go on. At least one plugin must implement it."""

    @hookspec
    def progress(self, stage: str, done: int, total: int, run: Run) -> None:
        """`done` of `total` pieces of work of a stage are finished; called at least at the start of every stage."""

    @hookspec
    def round_finished(self, lineage: Lineage, run: Run) -> None:
        """A round has been added to the lineage."""

    @hookspec
    def teardown(self, run: Run) -> None:
        """The run has ended, well or badly."""


ROLES: dict[str, type] = {
    "selector": Selector,
    "editor": Editor,
    "rewarder": Rewarder,
    "updater": Updater,
    "evaluator": Evaluator,
}
"""The five roles and the hooks that each may implement (besides `prepare`)."""

SPECS: tuple[type, ...] = (Preparation, *ROLES.values(), Observer)


class Hooks(Protocol):
    """The typed face of ``pluggy.PluginManager.hook`` that the loop calls."""

    def prepare(self, *, root: Candidate, run: Run) -> Candidate: ...
    def select(self, *, lineage: Lineage, run: Run) -> Sequence[Candidate]: ...
    def propose(self, *, parents: Sequence[Candidate], lineage: Lineage, run: Run) -> Sequence[Edit]: ...
    def apply(self, *, edits: Sequence[Edit], lineage: Lineage, run: Run) -> Sequence[Trial]: ...
    def reward(self, *, trials: Sequence[Trial], lineage: Lineage, run: Run) -> Sequence[Evaluation]: ...
    def update(self, *, trials: Sequence[Trial], rewards: Sequence[Evaluation], lineage: Lineage, run: Run) -> Sequence[Candidate]: ...
    def evaluate(
        self,
        *,
        candidates: Sequence[Candidate],
        trials: Sequence[Trial],
        rewards: Sequence[Evaluation],
        lineage: Lineage,
        run: Run,
    ) -> Scores: ...
    def should_stop(self, *, lineage: Lineage, run: Run) -> str | None: ...
    def progress(self, *, stage: str, done: int, total: int, run: Run) -> None: ...
    def round_finished(self, *, lineage: Lineage, run: Run) -> None: ...
    def teardown(self, *, run: Run) -> None: ...


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks. One per run, never a global."""
    manager = pluggy.PluginManager(PROJECT)
    for spec in SPECS:
        manager.add_hookspecs(spec)
    return manager


def calls(manager: pluggy.PluginManager) -> Hooks:
    """The manager's hooks, typed."""
    return cast(Hooks, cast(Any, manager.hook))
