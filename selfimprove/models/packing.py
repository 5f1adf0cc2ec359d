"""Rows of different lengths without padding: where tokens lie, and who attends to whom.

A pass has T tokens laid end to end, so every linear module works on real tokens only. Attention and adapters see them as
padded rows; both are gathers, and cheap next to the linear modules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "selfimprove_packed"
PRODUCTS = 2**26
"""The most scores that exist at one time."""
KEYS = 2**17
"""The most keys that rows are padded to together, their copies of a prefix's included."""


class Ragged:
    """R rows of different lengths: T tokens in all, L in the longest row.

    Args:
        lengths: tokens of each row.
        order: which token comes at each place of the rows laid end to end; as they come where it is None. (T,)
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", order: np.ndarray[Any, Any] | None = None) -> None:
        sizes = np.asarray(lengths)  # small index arithmetic: numpy starts no threads for it
        columns = np.arange(max(1, sizes.max()))
        mask = columns[None] < sizes[:, None]
        self.rows, self.width = mask.shape
        slots = np.flatnonzero(mask)
        order = np.arange(len(slots)) if order is None else order
        self.full = bool(mask.all()) and bool((order[1:] > order[:-1]).all())  # nothing is padded, and nothing changes places
        gather = np.zeros(mask.size, dtype=np.int64)
        gather[slots] = order
        scatter = np.empty(len(slots), dtype=np.int64)
        scatter[order] = slots
        self.mask = torch.from_numpy(mask).to(device)  # (R, L)
        self.gather = torch.from_numpy(gather).to(device)  # (R·L,) which token; 0 for padding
        self.scatter = torch.from_numpy(scatter).to(device)  # (T,) which place in R·L
        self.positions = torch.from_numpy(np.broadcast_to(columns, mask.shape)[mask]).to(device)  # (T,) of rows laid end to end

    @classmethod
    def by_owner(cls, owners: Sequence[int], lengths: Sequence[int], count: int, device: torch.device | str = "cpu") -> Ragged:
        """Row k holds the tokens that k owns, whatever order the owners' pieces of these lengths come in."""
        whose = np.repeat(np.asarray(owners), np.asarray(lengths))
        return cls(np.bincount(whose, minlength=count).tolist(), device, whose.argsort(kind="stable"))

    def pad(self, tokens: Tensor) -> Tensor:
        """(T, d) -> (R, L, d)"""
        if self.full:
            return tokens.view(self.rows, self.width, -1)
        moved: Tensor = _Move.apply(tokens, self.gather, self.scatter, None)  # type: ignore[no-untyped-call]
        return moved.view(self.rows, self.width, -1)

    def flat(self, rows: Tensor) -> Tensor:
        """(R, L, d) -> (T, d)"""
        rows = rows.reshape(self.rows * self.width, -1)
        if self.full:
            return rows
        moved: Tensor = _Move.apply(rows, self.scatter, self.gather, self.mask.view(-1, 1))  # type: ignore[no-untyped-call]
        return moved


class _Move(torch.autograd.Function):
    """``x[there]``, whose gradient is ``g[back]``: a gather both ways, since no token is used twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, mask: Tensor | None) -> Tensor:
        ctx.back, ctx.mask = back, mask
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.back)
        return (grad if ctx.mask is None else grad.mul_(ctx.mask)), None, None, None


class Attend(Protocol):
    """Who sees whom in one pass."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        """(B, H, T, D), (B, G, S, D) twice -> (B, T, H, D)"""


class Packed:
    """Causal attention within each row, all of which see a prefix that the cache holds.

    Neighbouring rows of similar length are padded together, so rows should come in the order of their lengths.

    Args:
        lengths: tokens of each row. (R,)
        prefix: tokens of the prefix; the cache begins with one copy of it for each owner.
        owners: whose copy each row sees; the only one where it is None. (R,)
        branches: where rows are trees, a number for each token of each row: it sees the tokens of its own number and of number 0.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        prefix: int = 0,
        owners: Sequence[int] | None = None,
        branches: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.prefix, self.device = prefix, device
        self.parts = [_Part(self, range(*part), lengths, owners, branches) for part in _similar(lengths, prefix)]
        self.sizes = [len(p.ragged.scatter) for p in self.parts]
        self.positions = torch.cat([p.ragged.positions for p in self.parts])  # (T,) of each token in its row

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        before = key.shape[2] - query.shape[2]
        q, k, v = (torch.split(_flat(x, begin), self.sizes) for x, begin in ((query, 0), (key, before), (value, before)))
        early = [torch.unflatten(x[0, :, :before], 1, (-1, self.prefix)).transpose(0, 1) for x in (key, value)] if before else None
        heads, size = query.shape[1], query.shape[3]
        out = [p.attend(*x, heads, size, early, scaling) for p, x in zip(self.parts, zip(q, k, v, strict=True), strict=True)]
        return torch.cat(out).view(1, query.shape[2], heads, size)


class _Part:
    """Rows that are padded together."""

    def __init__(
        self,
        packed: Packed,
        rows: range,
        lengths: Sequence[int],
        owners: Sequence[int] | None,
        branches: Sequence[Sequence[int]] | None,
    ) -> None:
        self.ragged = Ragged([lengths[i] for i in rows], packed.device)
        self.owners = None if owners is None else torch.tensor([owners[i] for i in rows], device=packed.device)
        own = np.tri(self.ragged.width, dtype=bool)
        if branches is not None:
            number = np.full((len(rows), self.ragged.width), -1)
            for n, i in enumerate(rows):
                number[n, : lengths[i]] = branches[i]
            own = own & ((number[:, None] == 0) | (number[:, None] == number[:, :, None]))[:, None]
        seen = np.concatenate([np.ones((*own.shape[:-1], packed.prefix), dtype=bool), own], axis=-1)
        self.causal = branches is None and not packed.prefix
        self.seen = torch.from_numpy(seen).to(packed.device)  # (L, S + L), or (R, 1, L, S + L) for trees

    def attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int, size: int, early: Sequence[Tensor] | None, scaling: float) -> Tensor:
        """(T, H·D), (T, G·D) twice, (K, G, S, D) twice -> (T, H·D)"""
        q, k, v = (self._rows(x, size) for x in (query, key, value))
        if early is not None:
            k, v = (torch.cat([self._copies(x), own], dim=2) for x, own in zip(early, (k, v), strict=True))
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # whose fused kernel is slower than anything else there (decision 0010)
            if heads * self.seen.shape[-1] * q.shape[2] * len(q) <= PRODUCTS:
                return self.ragged.flat(by_products(q * scaling, k, v, self.hidden).transpose(1, 2))
            q, k, v = q.float(), k.float(), v.float()
        seen = None if self.causal else self.seen
        out = scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal, scale=scaling, enable_gqa=heads != k.shape[1])
        return self.ragged.flat(out.transpose(1, 2)).to(query.dtype)

    @functools.cached_property
    def hidden(self) -> Tensor:
        """What is added to scores: -∞ where a token does not see another. (L, S + L), or (R, 1, L, S + L) for trees"""
        return torch.zeros(self.seen.shape, dtype=torch.bfloat16, device=self.seen.device).masked_fill_(~self.seen, -torch.inf)

    def _rows(self, x: Tensor, size: int) -> Tensor:
        """(T, H·D) -> (R, H, L, D)"""
        return self.ragged.pad(x).view(self.ragged.rows, self.ragged.width, -1, size).transpose(1, 2)

    def _copies(self, x: Tensor) -> Tensor:
        """(K, G, S, D) -> (R, G, S, D)"""
        return x.expand(self.ragged.rows, -1, -1, -1) if self.owners is None else x[self.owners]


def by_products(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """Attention with all scores at once; query heads that share keys are one product. (R, H, L, D), (R, G, S, D) twice -> (R, H, L, D)"""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    q = query.reshape(rows * groups, -1, size)
    k, v = (x.reshape(rows * groups, -1, size) for x in (key, value))
    scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, length, -1)
    weights = (scores + hidden).softmax(dim=-1)  # summed in float32 whatever the type
    return torch.bmm(weights.view(*q.shape[:2], -1), v).view(query.shape)


def _flat(x: Tensor, begin: int) -> Tensor:
    """(1, H, begin + T, D) -> (T, H·D)"""
    return x[0, :, begin:].transpose(0, 1).flatten(1)


def _similar(lengths: Sequence[int], prefix: int = 0) -> list[tuple[int, int]]:
    """Runs of neighbouring rows, (first, past the last), none of which is much longer than another of its run."""
    runs: list[tuple[int, int]] = []
    begin, least, most = 0, lengths[0], lengths[0]
    for i, length in enumerate(lengths):
        least, most = min(least, length), max(most, length)
        if i > begin and (most > max(16, 1.5 * least) or (i + 1 - begin) * (prefix + most) > KEYS):
            runs.append((begin, i))
            begin, least, most = i, length, length
    return [*runs, (begin, len(lengths))]


class Decoding:
    """One new token per row, which sees its row's keys and, before them, a prefix that is kept once per owner.

    Args:
        lengths: keys of each row, the new token's included. (N,)
        prefix: per layer, keys and values of the prefix, (K, G, S, D) each.
        layout: the rows of each owner. (K, ·)
    """

    def __init__(self, lengths: Tensor, prefix: Sequence[tuple[Tensor, Tensor]] | None = None, layout: Ragged | None = None) -> None:
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        self.seen = (columns[None] < lengths[:, None])[:, None, None]  # (N, 1, 1, C)
        self.prefix, self.layout = prefix, layout

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int) -> Tensor:
        rows, heads, _, size = query.shape
        groups = key.shape[1]
        if self.prefix is None or self.layout is None:
            if query.device.type == "cpu" and query.dtype == torch.bfloat16:
                return by_products(query * scaling, key, value, self.hidden).transpose(1, 2)
            return scaled_dot_product_attention(query, key, value, self.seen, scale=scaling, enable_gqa=heads != groups).transpose(1, 2)
        q = (query * scaling).view(rows, groups, heads // groups, size)
        k, v = (x.reshape(rows * groups, -1, size) for x in (key, value))
        scores = torch.bmm(q.reshape(rows * groups, -1, size), k.transpose(1, 2)).view(rows, groups, heads // groups, -1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill_(~self.seen, -torch.inf)
        before_k, before_v = (x.flatten(0, 1) for x in self.prefix[layer])  # (K·G, S, D)
        owned = self._owned(q)  # (K·G, L·H/G, D)
        early = self._rows(torch.bmm(owned, before_k.transpose(1, 2)), rows, groups).to(scores.dtype)  # (N, G, H/G, S)
        weights = torch.cat([early, scores], dim=-1).softmax(dim=-1).to(v.dtype)
        early, late = torch.split(weights, [early.shape[-1], scores.shape[-1]], dim=-1)
        out = torch.bmm(late.reshape(rows * groups, -1, late.shape[-1]), v).view(rows, groups, -1, size)
        out = out + self._rows(torch.bmm(self._owned(early), before_v), rows, groups)
        return out.reshape(rows, 1, heads, size)

    @functools.cached_property
    def hidden(self) -> Tensor:
        return torch.zeros(self.seen.shape, dtype=torch.bfloat16, device=self.seen.device).masked_fill_(~self.seen, -torch.inf)

    def _owned(self, x: Tensor) -> Tensor:
        """(N, G, H/G, d) -> (K·G, L·H/G, d)"""
        assert self.layout is not None
        _, groups, share, size = x.shape
        padded = self.layout.pad(x.reshape(len(x), -1)).view(self.layout.rows, self.layout.width, groups, share, size)
        return padded.transpose(1, 2).reshape(self.layout.rows * groups, -1, size)

    def _rows(self, x: Tensor, rows: int, groups: int) -> Tensor:
        """(K·G, L·H/G, d) -> (N, G, H/G, d)"""
        assert self.layout is not None
        apart = x.view(self.layout.rows, groups, self.layout.width, -1, x.shape[-1]).transpose(1, 2)
        return self.layout.flat(apart).view(rows, groups, -1, x.shape[-1])


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: whatever the pass's `attend` says; its own fused attention where it says nothing."""
    attend: Attend | None = kwargs.pop("attend", None)
    if attend is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return attend(query, key, value, scaling, int(module.layer_idx)), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION, packed_attention)
