"""The ledger: what a run has spent, in units that do not depend on the machine's mood."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

UNITS = ("generated_tokens", "scored_tokens", "trained_tokens", "flops", "labels", "evaluations", "cpu_seconds", "seconds")
"""Tokens exclude padding. `flops` are nominal: computed from the model's size and the tokens, cached or not.
`labels` counts distinct questions whose answer was read. `cpu_seconds` are those of programs in the sandbox, `seconds` is wall clock:
the only units that two equal runs differ in."""
TIMED = ("cpu_seconds", "seconds")


class Ledger:
    """Running totals by unit, and by stage. Charged by the models, the judge, `run.task.labels` and the contracts."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = dict.fromkeys(UNITS, 0)
        self.by_stage: dict[str, dict[str, float]] = {}
        self.labelled: set[str] = set()
        self.stage = "start"
        self._clock = time.monotonic()

    def charge(self, **amounts: float) -> None:
        """Add to the totals, in the name of the current stage. Raises KeyError for a unit that is not in `UNITS`."""
        stage = self.by_stage.setdefault(self.stage, dict.fromkeys(UNITS, 0))
        for unit, amount in amounts.items():
            self.totals[unit] += amount
            stage[unit] += amount

    def charge_labels(self, ids: Iterable[str]) -> None:
        """Charge one label for each id that was not paid for before."""
        new = set(ids) - self.labelled
        self.labelled |= new
        self.charge(labels=len(new))

    def tick(self) -> None:
        """Charge the seconds since the last tick."""
        now = time.monotonic()
        self.charge(seconds=now - self._clock)
        self._clock = now

    def snapshot(self) -> dict[str, object]:
        """The JSON form, for the journal."""
        return {"totals": dict(self.totals), "by_stage": {s: dict(u) for s, u in self.by_stage.items()}}

    def restore(self, snapshot: Mapping[str, Mapping[str, object]], labelled: Iterable[str]) -> None:
        """Go back to what a journal line recorded."""
        self.totals = {**dict.fromkeys(UNITS, 0), **snapshot.get("totals", {})}  # type: ignore[dict-item]
        self.by_stage = {s: dict(u) for s, u in snapshot.get("by_stage", {}).items()}  # type: ignore[call-overload]
        self.labelled = set(labelled)
        self._clock = time.monotonic()
