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
        if end := list(r.ids) or frozen.encode(r.continuation):  # nothing is certain to follow
            key = (slot, r.prompt, r.chat)
            row = last.get(key) or _Row(slot, frozen.encode_prompt(r.prompt, r.chat))
            if key not in last or sum(len(e) for _, e in row.ends) + len(end) > step_tokens:  # a full pass: memory stays bounded
                row = last[key] = _Row(slot, row.prompt)
                rows.append(row)
            row.ends.append((i, end))
            nominal += len(row.prompt) + len(end) - 1
            targets += len(end)
    found: dict[int, list[_Token]] = {}
    if rows:
        copies = bank.count if bank else 1
        shared = common([r.prompt for r in rows], copies)
        cache = None
        if shared:
            if bank:
                bank.use(Ragged([shared] * copies, frozen.device))
            cache = frozen.prefix(rows[0].prompt[:shared], copies)
        for group in _passes(sorted(rows, key=lambda r: r.length(shared)), shared, step_tokens):
            found.update(_pass(frozen, tile, group, bank, shared, cache, logit_rows))
            if cache is not None:
                cache.crop(-sum(r.length(shared) for r in group))  # back to the prefix
    return [_likelihood(r, found.get(i, [])) for i, r in enumerate(tile)], nominal, targets


_Token = tuple[float, float, float]
"""Log-probability of a token, entropy and self-certainty of what it was drawn from; the two latter are 0 where nobody asks."""


def _likelihood(request: Score, tokens: Sequence[_Token]) -> Likelihood:
    total = sum(logprob for logprob, _, _ in tokens)
    return Likelihood(total, len(tokens), *zip(*tokens, strict=True)) if request.by_token and tokens else Likelihood(total or 0.0, len(tokens))


def _pass(
    frozen: Frozen, tile: Sequence[Score], rows: Sequence[_Row], bank: Bank | None, shared: int, cache: DynamicCache | None, logit_rows: int
) -> dict[int, list[_Token]]:
    """The tokens of every request that these rows answer."""
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
    temperature = frozen.tensor([tile[i].temperature for i in owner])[:, None]
    by_token = any(tile[i].by_token for i in owner)
    told: list[_Token] = []
    for begin in range(0, len(keep), logit_rows):
        part = slice(begin, begin + logit_rows)
        logits = frozen.logits(hidden[frozen.tensor(keep[part])])
        logprobs = _log_softmax(logits if not (temperature != 1).any() else logits / temperature[part])
        chosen = logprobs.gather(1, frozen.tensor(wanted[part])[:, None]).squeeze(1)
        nothing = torch.zeros_like(chosen)
        entropies, certainties = (-(logprobs.exp() * logprobs).sum(1), -logprobs.mean(1)) if by_token else (nothing, nothing)
        told += [(x, y, z) for x, y, z in torch.stack([chosen, entropies, certainties], dim=1).double().cpu().tolist()]
    found: dict[int, list[_Token]] = {}
    for i, token in zip(owner, told, strict=True):
        found.setdefault(i, []).append(token)
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
