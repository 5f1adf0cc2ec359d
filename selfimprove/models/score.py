"""Likelihoods of continuations under many adapters: what texts begin with is computed once, logits only where they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import DynamicCache

from selfimprove.models.api import Likelihood, Score
from selfimprove.models.bank import Bank
from selfimprove.models.frozen import Frozen
from selfimprove.models.generate import common
from selfimprove.models.packing import Packed, Ragged


@dataclass(slots=True)
class _Row:
    """A prompt and the continuations that are asked for after it: one row, in which continuations do not see one another."""

    slot: int
    prompt: list[int]
    ends: list[tuple[int, list[int]]] = field(default_factory=list)
    """(request, tokens)"""

    def length(self, shared: int) -> int:
        return len(self.prompt) - shared + sum(len(e) - 1 for _, e in self.ends)

    def tokens(self, shared: int) -> list[int]:
        return self.prompt[shared:] + [t for _, e in self.ends for t in e[:-1]]

    def branches(self, shared: int) -> list[int]:
        """0 for the prompt's tokens, n for those of continuation n."""
        return [0] * (len(self.prompt) - shared) + [n + 1 for n, (_, e) in enumerate(self.ends) for _ in e[:-1]]

    def positions(self) -> list[int]:
        return list(range(len(self.prompt))) + [len(self.prompt) + i for _, e in self.ends for i in range(len(e) - 1)]


def score(
    frozen: Frozen, tile: Sequence[Score], bank: Bank | None, slots: Sequence[int], step_tokens: int, logit_rows: int
) -> tuple[list[Likelihood], int, int]:
    """The likelihoods, and the numbers of tokens and of logits that they are nominally worth: every text on its own."""
    rows: list[_Row] = []
    last: dict[tuple[int, str, bool], _Row] = {}  # the row that a prompt's next continuation goes into
    nominal, targets = 0, 0
    for i, (r, slot) in enumerate(zip(tile, slots, strict=True)):
        if end := frozen.encode(r.continuation):  # nothing is certain to follow
            key = (slot, r.prompt, r.chat)
            row = last.get(key) or _Row(slot, frozen.encode_prompt(r.prompt, r.chat))
            if key not in last or sum(len(e) for _, e in row.ends) + len(end) > step_tokens:  # a full pass: memory stays bounded
                row = last[key] = _Row(slot, row.prompt)
                rows.append(row)
            row.ends.append((i, end))
            nominal += len(row.prompt) + len(end) - 1
            targets += len(end)
    sums: dict[int, tuple[float, int]] = {}
    if rows:
        copies = bank.count if bank else 1
        shared = common([r.prompt for r in rows], copies)
        cache = None
        if shared:
            if bank:
                bank.use(Ragged([shared] * copies, frozen.device))
            cache = frozen.prefix(rows[0].prompt[:shared], copies)
        for group in _passes(sorted(rows, key=lambda r: r.length(shared)), shared, step_tokens):
            sums.update(_pass(frozen, group, bank, shared, cache, logit_rows))
            if cache is not None:
                cache.crop(-sum(r.length(shared) for r in group))  # back to the prefix
    return [Likelihood(*sums.get(i, (0.0, 0))) for i in range(len(tile))], nominal, targets


def _pass(
    frozen: Frozen, rows: Sequence[_Row], bank: Bank | None, shared: int, cache: DynamicCache | None, logit_rows: int
) -> dict[int, tuple[float, int]]:
    """Log-likelihood and number of tokens of every request that these rows answer."""
    lengths = [r.length(shared) for r in rows]
    slots = [r.slot for r in rows]
    if bank:
        bank.use(Ragged.by_owner(slots, lengths, bank.count, frozen.device))
    branches = [r.branches(shared) for r in rows] if any(len(r.ends) > 1 for r in rows) else None
    attend = Packed(lengths, frozen.device, shared if cache is not None else 0, slots if bank and bank.count > 1 else None, branches)
    positions = frozen.tensor([p for r in rows for p in r.positions()[shared:]])[None]
    hidden = frozen.forward(frozen.tensor([t for r in rows for t in r.tokens(shared)])[None], positions, attend, cache)[0]
    keep: list[int] = []
    wanted: list[int] = []
    owner: list[int] = []
    at = 0
    for row, length in zip(rows, lengths, strict=True):
        first = at + len(row.prompt) - shared
        branch = first
        for i, end in row.ends:
            keep += [first - 1, *range(branch, branch + len(end) - 1)]
            wanted += end
            owner += [i] * len(end)
            branch += len(end) - 1
        at += length
    logprobs = torch.cat(
        [
            _log_softmax(frozen.logits(hidden[frozen.tensor(keep[part])])).gather(1, frozen.tensor(wanted[part])[:, None]).squeeze(1).double().cpu()
            for part in (slice(begin, begin + logit_rows) for begin in range(0, len(keep), logit_rows))
        ]
    )
    found: dict[int, tuple[float, int]] = {}
    for i, value in zip(owner, logprobs.tolist(), strict=True):
        total, count = found.get(i, (0.0, 0))
        found[i] = (total + value, count + 1)
    return found


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or better. (N, V) -> (N, V)"""
    return log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _passes(rows: Sequence[_Row], shared: int, limit: int) -> Iterator[list[_Row]]:
    """Runs of rows of at most `limit` tokens together, or a single one."""
    group: list[_Row] = []
    size = 0
    for row in rows:
        more = row.length(shared)
        if group and size + more > limit:
            yield group
            group, size = [], 0
        group.append(row)
        size += more
    if group:
        yield group
