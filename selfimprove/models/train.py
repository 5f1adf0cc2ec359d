"""Training a bank of adapters: every step takes the next batch of each adapter's own documents, in one pass."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from selfimprove.models.api import Lora, Train
from selfimprove.models.bank import Bank
from selfimprove.models.frozen import Frozen
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.packing import Packed, Ragged
from selfimprove.models.rows import Encoded, Row, kept, rows_of

SOFTMAX_ROWS = 32
"""Rows of logits that become their gradient at a time, while a processor's cache holds them."""

Batch = tuple[int, list[Encoded]]
"""The slot of an adapter, and the documents that it takes a step on."""
Weigh = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the log-probabilities of all targets: what is told about each, and the loss's derivative by minus each. (N,) -> (N, …), (N,)"""
Loss = Callable[[Sequence[tuple[int, Encoded]], Tensor, Tensor], Weigh]
"""From the rows of a pass with their owners, the owner of every target and the targets of every owner in all passes. (N,), (G,)"""
Entropy = Callable[[Sequence[tuple[int, Encoded]]], Tensor]


def train(frozen: Frozen, tile: Sequence[Train], step_tokens: int, logit_rows: int) -> tuple[Bank, list[int], list[float]]:
    """The trained bank, and for each adapter the tokens trained on and the mean loss per token of the last epoch.

    The loss of an adapter is the mean over the tokens of its batch, so adapters do not touch one another, and each has epochs, batches and a
    rate of its own.
    """
    lora = tile[0].lora  # for what a bank has in common
    bank = Bank(frozen.model, lora, len(tile))
    bank.initialise([r.seed for r in tile])
    encoded = [[Encoded(*frozen.encode_document(d)) for d in r.documents] for r in tile]
    split = bool(lora.first_layer) and frozen.splits
    if split:
        cache_below(frozen, [d for documents in encoded for d in documents], lora.first_layer, step_tokens)
    plans = [plan(len(documents), r.lora, r.seed) for documents, r in zip(encoded, tile, strict=True)]
    optimizer = BankAdamW(bank.parameters(), [r.lora for r in tile], [len(p) for p in plans])
    tokens, count = [0] * len(tile), [0] * len(tile)
    loss = torch.zeros(len(tile), device=frozen.device)
    with bank.attached(), frozen.layers(lora.first_layer, None) if split else contextlib.nullcontext():
        for step in range(max(map(len, plans))):
            active = [k for k, p in enumerate(plans) if step < len(p)]
            for group in passes([(k, [encoded[k][d] for d in plans[k][step]]) for k in active], step_tokens, frozen.shares):
                losses, counts = backward(frozen, bank, group, step_tokens, logit_rows)
                last = [step >= len(plans[k]) - len(plans[k]) // tile[k].lora.epochs for k, _ in group]
                loss[group[0][0] : group[-1][0] + 1] += losses * frozen.tensor(last)
                for (k, batch), n, counted in zip(group, counts, last, strict=True):
                    tokens[k] += sum(len(d.ids) for d in batch)
                    count[k] += n * counted
            optimizer.step(active, step)
    return bank, tokens, [total / max(1, n) for total, n in zip(loss.tolist(), count, strict=True)]


def likelihood(rows: Sequence[tuple[int, Encoded]], owner: Tensor, counts: Tensor) -> Weigh:
    """The mean over each adapter's targets of minus the log-likelihood."""
    weight = 1.0 / counts.double().clamp(min=1)[owner]
    return lambda logprobs: (-logprobs, weight)


def backward(
    frozen: Frozen,
    bank: Bank,
    group: Sequence[Batch],
    step_tokens: int,
    logit_rows: int,
    loss: Loss = likelihood,
    temperature: float = 1.0,
    entropy: Entropy | None = None,
) -> tuple[Tensor, list[int]]:
    """Makes the gradients those of each adapter's loss; returns sums of what the loss tells (on the device, unwaited for) and numbers of targets.

    Args:
        group: neighbouring adapters; a single one's batch may be larger than a pass, and is computed in several.
        entropy: from the rows of a pass, what the entropy at every target weighs in the loss. (N,)
    """
    first = group[0][0]
    rows = sorted(((k - first, row) for k, batch in group for row in rows_of(batch, frozen.shares)), key=lambda x: x[1].length)
    if not rows:  # every text is empty, and nothing predicts its end
        for stack in bank.parameters():
            if stack.grad is not None:
                stack.grad[first : first + len(group)] = 0
        return torch.zeros(len(group), device=frozen.device), [0] * len(group)
    counts = [0] * len(group)
    for g, row in rows:
        counts[g] += sum(len(d.ids) - d.begin for d in row.documents)
    sums = None
    for piece in [rows] if len(group) > 1 else _pieces(rows, step_tokens):
        bank.use(
            Ragged.by_owner([g for g, _ in piece], [row.length for _, row in piece], len(group), frozen.device),
            slice(first, first + len(group)),
            more=sums is not None,
        )
        told = _backward(frozen, piece, counts, logit_rows, loss, temperature, entropy)
        sums = told if sums is None else sums + told
    assert sums is not None
    return sums, counts


def _backward(
    frozen: Frozen,
    rows: Sequence[tuple[int, Row]],
    counts: Sequence[int],
    logit_rows: int,
    loss: Loss,
    temperature: float,
    entropy: Entropy | None,
) -> Tensor:
    """One pass of `backward`: the sums of what the loss tells, by owner. (G, …)"""
    lengths = [row.length for _, row in rows]
    alone = all(len(row.documents) == 1 for _, row in rows)
    attend = Packed(lengths, frozen.device, branches=None if alone else [row.branches() for _, row in rows])
    below = kept([row for _, row in rows])
    ids, positions = (frozen.tensor([x for _, row in rows for x in part(row)])[None] for part in (Row.tokens, Row.positions))
    hidden = frozen.forward(ids, positions, attend, below=None if below is None else below[None])[0]  # (T, d)
    owned = [(g, d) for g, row in rows for d in row.documents]
    targets = [t for _, d in owned for t in d.ids[d.begin :]]
    whose = frozen.tensor([g for g, d in owned for _ in d.ids[d.begin :]])
    begins = itertools.accumulate(lengths[:-1], initial=0)
    keep = [begin + place for begin, (_, row) in zip(begins, rows, strict=True) for place in row.sources()]
    weigh = loss(owned, whose, frozen.tensor(list(counts)))
    used = hidden.index_select(0, frozen.tensor(keep))
    sharpen = entropy(owned).to(frozen.device) if entropy else None
    told, grad = head_gradient(used.detach(), frozen, frozen.tensor(targets), weigh, logit_rows, temperature, sharpen)
    used.backward(grad)  # type: ignore[no-untyped-call]
    return torch.zeros((len(counts), *told.shape[1:]), device=frozen.device).index_add_(0, whose, told.float())


def _pieces(rows: Sequence[tuple[int, Row]], limit: int) -> Iterator[list[tuple[int, Row]]]:
    """Runs of rows that compute at most `limit` tokens together, or are one row."""
    piece: list[tuple[int, Row]] = []
    size = 0
    for g, row in rows:
        if piece and size + row.length > limit:
            yield piece
            piece, size = [], 0
        piece.append((g, row))
        size += row.length
    yield piece


@torch.no_grad()
def head_gradient(
    hidden: Tensor,
    frozen: Frozen,
    targets: Tensor,
    weigh: Weigh,
    logit_rows: int,
    temperature: float = 1.0,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the loss tells at each position, and its gradient by the hidden states; never all logits at once.

    Written out because logits are the largest tensor by far: each chunk becomes its own gradient, and gives its memory to the next.
    (N, d), (N,) -> (N, …), (N, d)

    Args:
        entropy: what the entropy at each position weighs in the loss, which is the first of what the loss tells. (N,)
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shape = (min(len(hidden), logit_rows), len(frozen.head))
    space = None if frozen.lays_head else hidden.new_empty(shape)
    slope = hidden.new_empty(shape) if entropy is not None else None  # of the entropy, by the logits
    grad = torch.empty_like(hidden)  # of minus the log-probability, until all are known and the loss can weigh them
    sharper = torch.empty_like(hidden) if entropy is not None else None  # of the entropy
    logprobs, entropies = [], []
    for begin in range(0, len(hidden), logit_rows):
        part = slice(begin, begin + logit_rows)
        logits = frozen.logits(hidden[part], None if space is None else space[: len(hidden[part])])
        for at in range(0, len(logits), SOFTMAX_ROWS):
            few, wanted = logits[at : at + SOFTMAX_ROWS], targets[part][at : at + SOFTMAX_ROWS, None]
            scaled = few.to(wide) if temperature == 1 else few.to(wide) / temperature
            p = scaled.softmax(dim=1)
            logprobs.append(p.gather(1, wanted).clamp(min=1e-30).log().squeeze(1))
            if slope is not None:  # H = −Σ p log p, and dH/dz = −p (log p + H)
                logs = scaled.log_softmax(dim=1)
                entropies.append(-(p * logs).sum(dim=1))
                slope[at : at + len(few)] = -p * (logs + entropies[-1][:, None])
            few.copy_(p.scatter_add_(1, wanted, p.new_full((1, 1), -1.0).expand(len(p), 1)))
        torch.mm(logits, frozen.head, out=grad[part])
        if slope is not None and sharper is not None:
            torch.mm(slope[: len(logits)], frozen.head, out=sharper[part])
        del logits, few, scaled  # views of one memory, which the next chunk may take
    told, weight = weigh(torch.cat(logprobs))
    grad *= weight[:, None].to(wide) / temperature
    if sharper is not None and entropy is not None:
        told[:, 0] += entropy * torch.cat(entropies)
        grad += sharper * (entropy[:, None].to(wide) / temperature)
    return told, grad


@torch.no_grad()
def cache_below(frozen: Frozen, documents: Sequence[Encoded], first_layer: int, step_tokens: int) -> None:
    """Hidden states below the lowest adapter: the same in every epoch and for every adapter, so computed once per distinct text."""
    distinct = {tuple(d.ids): d for d in documents}
    with frozen.layers(0, first_layer):
        ordered = sorted(distinct.values(), key=lambda d: len(d.ids))
        for group in passes([(i, [d]) for i, d in enumerate(ordered)], step_tokens, share=False):
            rows = [d for _, batch in group for d in batch]
            hidden = frozen.packed([d.ids for d in rows])
            for d, states in zip(rows, torch.split(hidden, [len(d.ids) for d in rows]), strict=True):
                d.below = states
    for d in documents:
        d.below = distinct[tuple(d.ids)].below


def plan(documents: int, lora: Lora, seed: int) -> list[list[int]]:
    """The documents of every step: each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(lora.epochs):
        order = torch.randperm(documents, generator=generator).tolist()
        steps += [order[at : at + lora.batch] for at in range(0, documents, lora.batch)]
    return steps


def passes(batches: Sequence[Batch], limit: int, share: bool) -> Iterator[list[Batch]]:
    """Runs of neighbouring adapters whose batches compute at most `limit` tokens together (or are one adapter's)."""
    group: list[Batch] = []
    size = 0
    for k, batch in batches:
        more = sum(row.length for row in rows_of(batch, share))
        if group and (size + more > limit or group[-1][0] != k - 1):
            yield group
            group, size = [], 0
        group.append((k, batch))
        size += more
    if group:
        yield group
