"""The rows of a training pass: documents of one adapter that begin alike are one row, and what they begin with is computed once.

The rollouts of a question share its prompt, and turns of a chat share the template's beginning. Those tokens carry no loss, so a
gradient is the same whether they are computed once or once per document. A document's last token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOKENS = 256
"""The most tokens of a row whose documents share a short beginning: attention within a row grows with its square."""


@dataclass(slots=True)
class Encoded:
    """A document as tokens."""

    ids: list[int]
    start: int
    """Position of the first token that carries loss."""
    below: Tensor | None = None
    """Hidden states below the lowest adapter, where they are kept. (len(ids), d)"""
    values: Tensor | None = None
    """What an objective knows about every token that carries loss. (len(ids) − start, ·)"""

    @property
    def begin(self) -> int:
        """Position of the first target: the first token has nothing to be predicted from."""
        return max(1, self.start)


@dataclass(slots=True)
class Row:
    """Documents that do not see one another, after a beginning that all of them see."""

    shared: int
    """Tokens of the beginning; they carry no loss."""
    documents: list[Encoded]

    @property
    def length(self) -> int:
        return _length(self.shared, self.documents)

    def tokens(self) -> list[int]:
        return self.documents[0].ids[: self.shared] + [t for d in self.documents for t in d.ids[self.shared : -1]]

    def positions(self) -> list[int]:
        return [*range(self.shared), *(p for d in self.documents for p in range(self.shared, len(d.ids) - 1))]

    def branches(self) -> list[int]:
        """0 for the beginning, n for the tokens of document n."""
        return [0] * self.shared + [n for n, d in enumerate(self.documents, 1) for _ in d.ids[self.shared : -1]]

    def below(self) -> list[Tensor]:
        """The states that are kept, in the order of the tokens; none where they are not."""
        kept = [(d.below, len(d.ids)) for d in self.documents]
        return [x[begin:end] for x, begin, end in [(kept[0][0], 0, self.shared), *((x, self.shared, n - 1) for x, n in kept)] if x is not None]

    def sources(self) -> list[int]:
        """For every target, in order, the place in the row that predicts it."""
        found: list[int] = []
        at = self.shared
        for d in self.documents:
            found += [p if p < self.shared else at + p - self.shared for p in range(d.begin - 1, len(d.ids) - 1)]
            at += len(d.ids) - 1 - self.shared
        return found


def rows_of(documents: Sequence[Encoded], share: bool = True) -> list[Row]:
    """The rows of documents of one adapter; those without a target are in none. Without `share`, every document is a row."""
    rows: list[Row] = []
    for d in sorted((d for d in documents if len(d.ids) > d.begin), key=lambda d: d.ids[: d.start]):  # alike beginnings are neighbours
        if share and rows and (shared := _joined(rows[-1], d)) is not None:
            rows[-1] = Row(shared, [*rows[-1].documents, d])
        else:
            rows.append(Row(d.start, [d]))
    return rows


def _joined(row: Row, document: Encoded) -> int | None:
    """How much a row would share with one more document; None where that saves nothing, or the row gets too long."""
    most = min(row.shared, document.start)
    first = row.documents[0].ids
    shared = next((i for i in range(most) if first[i] != document.ids[i]), most)
    if shared <= len(row.documents) * (row.shared - shared):  # what others would have to compute again
        return None
    return shared if _length(shared, [*row.documents, document]) <= max(TOKENS, 2 * shared) else None


def _length(shared: int, documents: Sequence[Encoded]) -> int:
    return shared + sum(len(d.ids) - 1 - shared for d in documents)


def kept(rows: Sequence[Row]) -> Tensor | None:
    """The kept states of all rows; None where none are kept. (T, d)"""
    states = [x for row in rows for x in row.below()]
    return torch.cat(states) if states else None
