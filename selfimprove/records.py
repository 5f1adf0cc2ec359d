"""The records of a run: frozen, small, in input order.

State lives in candidates, history lives in the lineage, configuration lives in plugins. Content (weights,
optimizer moments, code) is never in a record: a `Part` names it by the digest of its derivation.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Any

from selfimprove import payloads
from selfimprove.errors import ContractError
from selfimprove.identity import digest

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Part:
    """One named piece of a candidate, identified by how it was derived, not by its bytes.

    The digest is known before the content exists; the store writes, prunes and re-derives content.
    """

    kind: str
    """What the content is: ``model``, ``adapter``, ``weights`` (that moved as a whole), ``text``, ``values``."""
    digest: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """One version of the system that improves itself."""

    id: str
    parts: Mapping[str, Part]
    """Parts by role: ``policy``, ``prompt``, ``code``, ``policy.optimizer``, …"""
    parents: tuple[str, ...] = ()

    @classmethod
    def root(cls, **parts: Part) -> Candidate:
        """The candidate that a run starts from."""
        return cls(digest("root", _parts(parts)), parts)

    def derive(self, *salt: str | int, **parts: Part) -> Candidate:
        """A child of this candidate with some parts replaced.

        `salt` tells apart children with equal parts (the round and the index, say).
        """
        merged = {**self.parts, **parts}
        return Candidate(digest("candidate", self.id, _parts(merged), salt), merged, (self.id,))


@dataclass(frozen=True, slots=True)
class Edit:
    """A change that parents propose to make to themselves."""

    parents: tuple[str, ...]
    """Ids of the candidates that wrote it; at least one."""
    payload: Any
    group: str = ""
    """Edits that are compared with one another share a group."""

    def __post_init__(self) -> None:
        if not self.parents:
            raise ContractError("an Edit needs at least one parent id; it got none")


@dataclass(frozen=True, slots=True)
class Trial:
    """An edit and the candidate that it would make."""

    edit: Edit
    candidate: Candidate
    replicate: int = 0
    """Which inner-loop seed made the candidate; replicates of one edit differ only in this."""
    error: str | None = None
    """Why the edit made nothing (it could not be parsed, it was empty); the candidate then has the parent's parts."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured, or why nothing could be measured."""

    score: float | None
    """The measurement; None means that there is none, and `error` says why."""
    metrics: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    per_item: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    """Value by item id: what paired comparisons and pooled scores are computed from."""
    credit: tuple[float, ...] = ()
    """Reward per token or step of the payload, where a rewarder gives it."""
    experience: tuple[Any, ...] = ()
    """Payloads that measuring produced and an update may use (continuations, solutions)."""
    artifacts: Mapping[str, str] = field(default_factory=lambda: _EMPTY)
    """Digests of blobs, by name."""
    error: str | None = None

    def __post_init__(self) -> None:
        if self.score is not None and not isinstance(self.score, float | int):
            raise ContractError(f"a score is a number or None; got {type(self.score).__name__} (float(x) converts it)")
        if (self.score is None) != (self.error is not None):
            raise ContractError(f"an Evaluation has a score or an error, not both and not neither; got score={self.score} and error={self.error!r}")

    @classmethod
    def failed(cls, error: str) -> Evaluation:
        """An evaluation of something that could not be measured."""
        return cls(score=None, error=error)

    @property
    def finite(self) -> bool:
        return self.score is not None and math.isfinite(self.score)


@dataclass(frozen=True, slots=True)
class Round:
    """One round of the loop, as it happened."""

    parents: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    rewards: tuple[Evaluation, ...] = ()
    children: tuple[Candidate, ...] = ()
    scores: tuple[tuple[str, Evaluation], ...] = ()
    """Pairs (candidate id, evaluation), for any member of the lineage."""


class Lineage:
    """Everything that a run has made: the root and the rounds, as an append-only log and a length.

    ``lineage + round`` shares the log, so appending costs the round and not the history. Columns (position,
    pooled score, number of children) are kept as rounds arrive, so a selector reads them in O(1).
    """

    __slots__ = ("_length", "_log")

    def __init__(self, root: Candidate) -> None:
        self._log = _Log(root)
        self._length = 0

    def __add__(self, new: Round) -> Lineage:
        log = self._log
        if len(log.rounds) != self._length:  # an older view grows a branch of its own
            log = _Log(self.root)
            for old in self.rounds:
                log.append(old)
        log.append(new)
        grown = object.__new__(Lineage)
        grown._log, grown._length = log, self._length + 1
        return grown

    def __len__(self) -> int:
        return self._length

    @property
    def root(self) -> Candidate:
        return self._log.candidates[0]

    @property
    def rounds(self) -> tuple[Round, ...]:
        """All rounds, oldest first. O(rounds): use `round(i)` where one is enough."""
        return tuple(self._log.rounds[: self._length])

    def round(self, index: int) -> Round:
        """Round `index`; negative counts from the end of this view."""
        position = index if index >= 0 else self._length + index
        if not 0 <= position < self._length:
            raise IndexError(f"round {index} of a lineage with {self._length} rounds")
        return self._log.rounds[position]

    @property
    def size(self) -> int:
        """The number of candidates, root included."""
        return self._log.sizes[self._length]

    @property
    def latest(self) -> Candidate:
        """The youngest candidate: the last child, or the root while there is none."""
        return self._log.candidates[self.size - 1]

    def __iter__(self) -> Iterator[Candidate]:
        """All candidates, oldest first."""
        return (self._log.candidates[i] for i in range(self.size))

    def __reversed__(self) -> Iterator[Candidate]:
        """All candidates, youngest first."""
        return (self._log.candidates[i] for i in range(self.size - 1, -1, -1))

    def __contains__(self, candidate_id: str) -> bool:
        position = self._log.position.get(candidate_id)
        return position is not None and position < self.size

    def __getitem__(self, candidate_id: str) -> Candidate:
        """The candidate with this id. Raises KeyError."""
        if candidate_id not in self:
            raise KeyError(candidate_id)
        return self._log.candidates[self._log.position[candidate_id]]

    def round_of(self, candidate_id: str) -> int:
        """The round that made a candidate; -1 for the root."""
        position = self._log.position[self[candidate_id].id]
        return bisect_left(self._log.sizes, position + 1) - 1

    def score(self, candidate_id: str) -> float | None:
        """The mean over all evaluations of a candidate, weighted by their items; None without any."""
        entries = self._log.pooled.get(candidate_id, [])
        index = bisect_left(entries, self._length, key=lambda e: e[0])
        if index == 0:
            return None
        _, weight, total = entries[index - 1]
        return total / weight

    def evaluations(self, candidate_id: str) -> list[Evaluation]:
        """All evaluations of a candidate, oldest first, those without a score too."""
        entries = self._log.evaluated.get(candidate_id, [])
        return [e for _, e in entries[: bisect_left(entries, self._length, key=lambda e: e[0])]]

    def child_count(self, candidate_id: str) -> int:
        """How many candidates name this one as a parent."""
        return bisect_left(self._log.births.get(candidate_id, []), self.size)

    def best(self) -> Candidate | None:
        """The candidate with the highest finite pooled score, the oldest of equals; None without any score."""
        position = self._log.best[self._length]
        return None if position is None else self._log.candidates[position]


class _Log:
    """The growing columns that views of a lineage share."""

    def __init__(self, root: Candidate) -> None:
        self.rounds: list[Round] = []
        self.candidates: list[Candidate] = [root]
        self.sizes: list[int] = [1]  # number of candidates after n rounds
        self.position: dict[str, int] = {root.id: 0}
        self.births: dict[str, list[int]] = {}  # parent id -> positions of its children
        self.pooled: dict[str, list[tuple[int, float, float]]] = {}  # id -> (round, weight, weighted sum)
        self.evaluated: dict[str, list[tuple[int, Evaluation]]] = {}  # id -> (round, evaluation)
        self.ranked: list[tuple[float, int]] = []  # heap of (-score, position), with scores that candidates no longer have
        self.best: list[int | None] = [None]  # position of the best candidate after n rounds

    def append(self, new: Round) -> None:
        self._check(new)
        for child in new.children:
            for parent in dict.fromkeys(child.parents):
                self.births.setdefault(parent, []).append(len(self.candidates))
            self.position[child.id] = len(self.candidates)
            self.candidates.append(child)
        for candidate_id, evaluation in new.scores:
            self.evaluated.setdefault(candidate_id, []).append((len(self.rounds), evaluation))
            if evaluation.score is None:
                continue
            entries = self.pooled.setdefault(candidate_id, [])
            _, weight, total = entries[-1] if entries else (0, 0.0, 0.0)
            added = float(max(1, len(evaluation.per_item)))
            entries.append((len(self.rounds), weight + added, total + added * evaluation.score))
        self.rounds.append(new)
        self.sizes.append(len(self.candidates))
        self.best.append(self._best({self.position[i] for i, e in new.scores if e.score is not None}))

    def _check(self, new: Round) -> None:
        """Raises before anything is appended, so that a refused round leaves no trace."""
        young: set[str] = set()
        for child in new.children:
            if child.id in self.position or child.id in young:
                raise ContractError(f"candidate {child.id} is already in the lineage; derive children with a salt that is new")
            young.add(child.id)
        for candidate_id, _ in new.scores:
            if candidate_id not in self.position and candidate_id not in young:
                raise ContractError(f"candidate {candidate_id} has a score, but is not in the lineage; score its members and new children")

    def _best(self, changed: set[int]) -> int | None:
        """The best position, given those whose score changed in this round; logarithmic in the number of candidates."""
        for p in changed:
            if math.isfinite(score := self._score(p)):
                heappush(self.ranked, (-score, p))
        while self.ranked and -self.ranked[0][0] != self._score(self.ranked[0][1]):  # it has another score by now
            heappop(self.ranked)
        return self.ranked[0][1] if self.ranked else None

    def _score(self, position: int) -> float:
        _, weight, total = self.pooled[self.candidates[position].id][-1]
        return total / weight


def _parts(parts: Mapping[str, Part]) -> dict[str, str]:
    return {name: part.digest for name, part in parts.items()}


# ---- JSON forms, used by the journal -------------------------------------------------------------


def encode_candidate(c: Candidate) -> dict[str, Any]:
    return {"id": c.id, "parts": {n: [p.kind, p.digest] for n, p in c.parts.items()}, "parents": list(c.parents)}


def decode_candidate(data: Mapping[str, Any]) -> Candidate:
    return Candidate(data["id"], {n: Part(k, d) for n, (k, d) in data["parts"].items()}, tuple(data["parents"]))


def encode_evaluation(e: Evaluation) -> dict[str, Any]:
    full = {
        "score": e.score,
        "metrics": dict(e.metrics),
        "per_item": dict(e.per_item),
        "credit": list(e.credit),
        "experience": [payloads.encode(p) for p in e.experience],
        "artifacts": dict(e.artifacts),
        "error": e.error,
    }
    return {k: v for k, v in full.items() if v or k == "score" or (k == "error" and v is not None)}


def decode_evaluation(data: Mapping[str, Any]) -> Evaluation:
    return Evaluation(
        score=data["score"],
        metrics=data.get("metrics", _EMPTY),
        per_item=data.get("per_item", _EMPTY),
        credit=tuple(data.get("credit", ())),
        experience=tuple(payloads.decode(p) for p in data.get("experience", ())),
        artifacts=data.get("artifacts", _EMPTY),
        error=data.get("error"),
    )


def encode_round(r: Round) -> dict[str, Any]:
    """The JSON form of a round; an edit that several trials share is written once."""
    edits: dict[int, int] = {}
    for t in r.trials:
        edits.setdefault(id(t.edit), len(edits))
    unique = {id(t.edit): t.edit for t in r.trials}
    return {
        "parents": list(r.parents),
        "edits": [{"parents": list(e.parents), "payload": payloads.encode(e.payload), "group": e.group} for e in unique.values()],
        "trials": [[edits[id(t.edit)], encode_candidate(t.candidate), t.replicate, t.error] for t in r.trials],
        "rewards": [encode_evaluation(e) for e in r.rewards],
        "children": [encode_candidate(c) for c in r.children],
        "scores": [[i, encode_evaluation(e)] for i, e in r.scores],
    }


def decode_round(data: Mapping[str, Any]) -> Round:
    edits = [Edit(tuple(e["parents"]), payloads.decode(e["payload"]), e["group"]) for e in data["edits"]]
    return Round(
        parents=tuple(data["parents"]),
        trials=tuple(Trial(edits[i], decode_candidate(c), r, error) for i, c, r, error in data["trials"]),
        rewards=tuple(decode_evaluation(e) for e in data["rewards"]),
        children=tuple(decode_candidate(c) for c in data["children"]),
        scores=tuple((i, decode_evaluation(e)) for i, e in data["scores"]),
    )
