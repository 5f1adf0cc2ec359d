"""Generation with many adapters in one batch: beginnings in common computed once, and rows that finish make room for the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from selfimprove.models.api import Completion, Generate
from selfimprove.models.bank import Bank
from selfimprove.models.frozen import Frozen
from selfimprove.models.packing import Decoding, Packed, Ragged
from selfimprove.models.sampling import log_probabilities, sample

LONG = 8
"""Tokens from which on a common beginning is computed apart: a shorter one saves less than looking after it costs."""
FAR = 64
"""Tokens up to which rows get copies of a common beginning's keys: one look at more keys is faster than two."""


def common(prompts: Sequence[Sequence[int]], copies: int = 1) -> int:
    """How many tokens all prompts begin with, each keeping at least one of its own; 0 where computing them apart is not worthwhile.

    Args:
        copies: how often the beginning has to be computed: once per adapter.
    """
    if len(prompts) <= copies:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(map(len, prompts)) - 1
    shared = next((i for i in range(limit) if first[i] != last[i]), limit)
    return shared if shared >= LONG else 0


class _Rows:
    """Keys and values of the rows in flight, one allocation; a step writes one column and copies nothing.

    transformers' attention calls `update` as it would a cache's.
    """

    def __init__(self, frozen: Frozen, rows: int, room: int) -> None:
        config = frozen.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (len(frozen.model.model.layers), 2, rows, config.num_key_value_heads, room, size)
        self.data = torch.zeros(shape, dtype=frozen.dtype, device=frozen.device)  # zeros: what is masked must still be finite
        self.lengths = torch.zeros(rows, dtype=torch.long, device=frozen.device)
        self.count = 0
        self.width = 0

    def admit(self, cache: DynamicCache, index: Tensor, lengths: Tensor) -> None:
        """Append rows.

        Args:
            index: where the cache holds the keys of each row. (m, L)
            lengths: how many of them count. (m,)
        """
        end = self.count + len(index)
        for i, layer in enumerate(cache.layers):
            for j, x in enumerate((layer.keys, layer.values)):
                self.data[i, j, self.count : end, :, : index.shape[1]] = x[0][:, index].transpose(0, 1)
        self.lengths[self.count : end] = lengths
        self.count, self.width = end, max(self.width, index.shape[1])

    def step(self) -> Tensor:
        """Make room for one token per row; the keys that each row will have. (N,)"""
        lengths = self.lengths[: self.count] + 1
        self.width = int(lengths.max())
        return lengths

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.count, device=keys.device)
        lengths = self.lengths[: self.count]
        found = []
        for j, new in enumerate((keys, values)):
            stored = self.data[layer, j]
            stored[rows, :, lengths] = new[:, :, 0]
            found.append(stored[: self.count, :, : self.width])
        return found[0], found[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.width

    def drop(self, kept: Sequence[int]) -> list[int]:
        """Let go of all rows but these: the last ones move into the gaps. Which old row is in each place now."""
        places = _compacted(kept)
        moves = [(to, at) for to, at in enumerate(places) if to != at]
        if moves:
            to, at = (torch.tensor(x, device=self.data.device) for x in zip(*moves, strict=True))
            self.data[:, :, to, :, : self.width] = self.data[:, :, at, :, : self.width]
            self.lengths[to] = self.lengths[at]
        self.count = len(places)
        return places


def _compacted(kept: Sequence[int]) -> list[int]:
    """The kept rows, so that as few as possible change places: gaps are filled from the end."""
    stay = [i for i in kept if i < len(kept)]
    movers = [i for i in kept if i >= len(kept)]
    gaps = sorted(set(range(len(kept))) - set(stay))
    places = dict(zip(stay, stay, strict=True)) | dict(zip(gaps, movers, strict=True))
    return [places[i] for i in range(len(kept))]


class Decoder:
    """Samples a tile of requests.

    Args:
        slots: the adapter of each request, as a slot of the bank.
        rows: rows in flight.
        cache_tokens: the most tokens whose keys and values are kept; fewer rows fly where they are long.
    """

    def __init__(self, frozen: Frozen, tile: Sequence[Generate], bank: Bank | None, slots: Sequence[int], rows: int, cache_tokens: int) -> None:
        self.frozen, self.tile, self.bank, self.slots = frozen, tile, bank, slots
        self.copies = bank.count if bank else 1
        encoded: dict[tuple[str, bool], list[int]] = {}
        for r in tile:
            if (r.prompt, r.chat) not in encoded:
                encoded[r.prompt, r.chat] = frozen.encode_prompt(r.prompt, r.chat)
        prompts = [encoded[r.prompt, r.chat] for r in tile]
        self.distinct = {(slot, tuple(p)) for slot, p in zip(slots, prompts, strict=True)}
        self.shared = common([p for _, p in self.distinct], self.copies)
        self.header = prompts[0][: self.shared]
        self.copied = self.shared if self.shared <= FAR else 0  # keys of the beginning that every row holds itself
        self.own = [p[self.shared :] for p in prompts]
        limit = max(r.max_tokens for r in tile)
        self.uniforms = torch.stack([torch.rand(limit, generator=torch.Generator().manual_seed(r.seed)) for r in tile]).to(frozen.device)
        room = self.copied + max(len(p) + r.max_tokens for p, r in zip(self.own, tile, strict=True))
        self.rows = _Rows(frozen, max(1, min(rows, len(tile), cache_tokens // room)), room)
        self.waiting = sorted(range(len(tile)), key=lambda i: (self.slots[i], len(self.own[i]), self.own[i]), reverse=True)
        self.flying: list[int] = []
        self.written: list[list[int]] = [[] for _ in tile]
        self.logprobs: list[list[float]] = [[] for _ in tile]
        self.done: dict[int, Completion] = {}

    @property
    def prefilled(self) -> int:
        """Tokens of the distinct prompts of every adapter."""
        return sum(len(p) for _, p in self.distinct)

    def run(self) -> list[Completion]:
        capacity = self.rows.data.shape[2]
        cache, prefix = DynamicCache(config=self.frozen.model.config), None
        if self.shared:
            if self.bank:
                self.bank.use(Ragged([self.shared] * self.copies, self.frozen.device))
            cache = self.frozen.prefix(self.header, self.copies)
            if not self.copied:
                prefix = [self._apart(layer.keys, layer.values) for layer in cache.layers]
        logits: Tensor | None = None
        while self.waiting or self.flying:
            free = capacity - len(self.flying)
            if self.waiting and free >= min(len(self.waiting), max(1, capacity // 4)):
                fresh = self._admit(cache, [self.waiting.pop() for _ in range(min(free, len(self.waiting)))])
                logits = fresh if logits is None or not len(logits) else torch.cat([logits, fresh])
            assert logits is not None
            tokens = self._sample(logits)
            logits = self._step(tokens, prefix) if self.flying else None
        return [self.done[i] for i in range(len(self.tile))]

    def _apart(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's keys and values by copy. (1, G, K·S, D) twice -> (K, G, S, D) twice"""
        found = [torch.unflatten(x[0], 1, (self.copies, self.shared)).transpose(0, 1).contiguous() for x in (keys, values)]
        return found[0], found[1]

    def _admit(self, cache: DynamicCache, requests: Sequence[int]) -> Tensor:
        """Compute these requests' prompts, each distinct one once, and put them in flight. The next token's logits, (m, V)."""
        frozen = self.frozen
        wanted = [(self.slots[i], tuple(self.own[i])) for i in requests]
        distinct = {prompt: n for n, prompt in enumerate(sorted(set(wanted), key=lambda x: (len(x[1]), x)))}
        owners, lengths = [slot for slot, _ in distinct], [len(p) for _, p in distinct]
        if self.bank:
            self.bank.use(Ragged.by_owner(owners, lengths, self.copies, frozen.device))
        before = self.copies * self.shared
        if not before:
            cache = DynamicCache(config=frozen.model.config)
        attend = Packed(lengths, frozen.device, self.shared, owners if self.copies > 1 else None)
        ids = frozen.tensor([t for _, p in distinct for t in p])[None]
        hidden = frozen.forward(ids, (attend.positions + self.shared)[None], attend, cache)[0]
        source = frozen.tensor([distinct[w] for w in wanted])
        own = Ragged(lengths, frozen.device)
        index = before + own.gather.view(own.rows, own.width)
        if self.copied:
            copies = frozen.tensor(owners)[:, None] * self.shared + torch.arange(self.shared, device=frozen.device)
            index = torch.cat([copies, index], dim=1)
        self.rows.admit(cache, index[source], self.copied + frozen.tensor(lengths)[source])
        if before:
            cache.crop(-ids.shape[1])  # back to the prefix
        self.flying += requests
        ends = frozen.tensor(lengths).cumsum(0) - 1
        return frozen.logits(hidden[ends])[source]

    def _sample(self, logits: Tensor) -> Tensor:
        """Write one token to every row, and let go of those that are done. The tokens of the others, (N,)"""
        at = self.frozen.tensor([len(self.written[i]) for i in self.flying])
        uniforms = self.uniforms[self.frozen.tensor(self.flying), at]
        tokens = sample(logits, [self.tile[i] for i in self.flying], uniforms)
        kept = []
        if told := [row for row, i in enumerate(self.flying) if self.tile[i].logprobs]:
            found = log_probabilities(logits[told], [self.tile[self.flying[row]] for row in told], tokens[told])
            for row, value in zip(told, found.tolist(), strict=True):
                self.logprobs[self.flying[row]].append(value)
        for row, (i, token) in enumerate(zip(self.flying, tokens.tolist(), strict=True)):
            self.written[i].append(token)
            finished = self._finished(self.tile[i], self.written[i])
            if finished is None:
                kept.append(row)
            elif self.tile[i].logprobs:
                self.done[i] = dataclasses.replace(finished, ids=tuple(self.written[i]), logprobs=tuple(self.logprobs[i]))
            else:
                self.done[i] = finished
        places = self.rows.drop(kept)
        self.flying = [self.flying[i] for i in places]
        return tokens[torch.tensor(places, dtype=torch.long, device=tokens.device)]

    def _step(self, tokens: Tensor, prefix: Sequence[tuple[Tensor, Tensor]] | None) -> Tensor:
        """The next token's logits of every row. (N,) -> (N, V)"""
        lengths = self.rows.step()
        layout = None
        if self.bank or prefix:
            layout = Ragged.by_owner([self.slots[i] for i in self.flying], [1] * len(self.flying), self.copies, self.frozen.device)
        if self.bank and layout:
            self.bank.use(layout)
        positions = (lengths - 1 + self.shared - self.copied)[:, None]
        hidden = self.frozen.forward(tokens[:, None], positions, Decoding(lengths, prefix, layout), self.rows)
        self.rows.lengths[: self.rows.count] += 1
        return self.frozen.logits(hidden[:, -1])

    def _finished(self, request: Generate, ids: list[int]) -> Completion | None:
        decode = self.frozen.tokenizer.decode
        if ids[-1] in self.frozen.stop_ids:
            return Completion(decode(ids[:-1]), len(ids), True)
        if request.stop:
            longest = max(map(len, request.stop))  # a token is at least one character, or a part of one
            tail = decode(ids[-4 * longest - 4 :])
            if any(s in tail for s in request.stop):
                text = decode(ids)
                if (cut := min((at for s in request.stop if (at := text.find(s)) >= 0), default=-1)) >= 0:
                    return Completion(text[:cut], len(ids), True)
        return Completion(decode(ids), len(ids), False) if len(ids) >= request.max_tokens else None
