"""Sampling next tokens: each row by its own settings and its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfimprove.models.api import Generate

_TOP = 512  # likeliest tokens looked at before a row's whole vocabulary is sorted


def sample(logits: Tensor, requests: Sequence[Generate], uniforms: Tensor) -> Tensor:
    """One token per row by inverting the cumulative distribution at the row's own uniform number. (N, V), (N,) -> (N,)"""
    chosen = logits.argmax(dim=-1)
    for nucleus in (False, True):
        rows = [i for i, r in enumerate(requests) if r.temperature > 0 and (r.top_p < 1) == nucleus]
        if rows:
            temperature = torch.tensor([requests[i].temperature for i in rows], device=logits.device)[:, None]
            p = (logits[rows].float() / temperature).softmax(dim=-1)
            if nucleus:
                top_p = torch.tensor([requests[i].top_p for i in rows], device=logits.device)[:, None]
                chosen[rows] = _nucleus(p, top_p, uniforms[rows][:, None])
            else:
                chosen[rows] = _invert(p, uniforms[rows][:, None])
    return chosen


def log_probabilities(logits: Tensor, requests: Sequence[Generate], tokens: Tensor) -> Tensor:
    """Log-probability of each row's token at its temperature (at 1 where that is 0), in nats. (N, V), (N,) -> (N,)"""
    temperature = torch.tensor([r.temperature or 1.0 for r in requests], device=logits.device)[:, None]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)


def _nucleus(whole: Tensor, top_p: Tensor, uniforms: Tensor) -> Tensor:
    """A token of the smallest set of likeliest ones whose mass reaches `top_p` (Holtzman et al. 2020). (N, V), (N, 1), (N, 1) -> (N,)"""
    p, order = whole.topk(min(_TOP, whole.shape[1]))
    flat = (p.sum(dim=-1, keepdim=True) < top_p).squeeze(1)
    chosen = order.gather(1, _invert(torch.where(p.cumsum(dim=-1) - p < top_p, p, 0.0), uniforms)[:, None]).squeeze(1)
    if flat.any():  # rare: the set is larger than what was looked at
        p, order = whole[flat].sort(descending=True)
        chosen[flat] = order.gather(1, _invert(torch.where(p.cumsum(dim=-1) - p < top_p[flat], p, 0.0), uniforms[flat])[:, None]).squeeze(1)
    return chosen


def _invert(p: Tensor, uniforms: Tensor) -> Tensor:
    """The index at each row's quantile. (N, V), (N, 1) -> (N,)"""
    cumulative = p.cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True).clamp(max=p.shape[1] - 1).squeeze(1)
