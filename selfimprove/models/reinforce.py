"""Policy gradient on a bank of adapters, several optimizer steps from the log-probabilities that sampling recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from selfimprove.models.api import Objective, Reinforce, Sample
from selfimprove.models.bank import Bank
from selfimprove.models.frozen import Frozen
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.rows import Encoded
from selfimprove.models.train import Weigh, backward, passes, plan

Start = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""The weights of an adapter, and its optimizer's moments; empty where they begin."""
WEIGHTS = 2
"""The column of `Encoded.values` that holds a token's weight."""


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor, objective: Objective, lengths: Tensor) -> Tensor:
    """The loss of each token: −min(ρA, clip(ρ)A) + β·k3, with ρ = π/π_old and k3 = π_ref/π − log(π_ref/π) − 1.  (N,) four times, (S,) -> (N,)

    Where the ratio is a sequence's, each of its T tokens has the T-th part of −min(ρA, clip(ρ)A).

    Args:
        lengths: tokens of every sequence; they stand one after another.

    Sources: Schulman et al. 2017 (arXiv 1707.06347), equation 7; Shao et al. 2024 (arXiv 2402.03300), equations 3 and 4; for whole sequences
    Ahmadian et al. 2024 (arXiv 2402.14740), to whom a completion is one action.
    """
    ratio = ratios(logprobs - old, objective, lengths)
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if objective.ratio == "sequence":
        loss = loss / lengths.repeat_interleave(lengths)
    if objective.beta:
        loss = loss + objective.beta * k3(reference - logprobs)
    return loss


def ratios(gap: Tensor, objective: Objective, lengths: Tensor) -> Tensor:
    """π/π_old at every token, its own or its whole sequence's, from the gaps log π − log π_old.  (N,), (S,) -> (N,)"""
    if objective.ratio == "token":
        return gap.exp()
    whose = torch.arange(len(lengths), device=gap.device).repeat_interleave(lengths)  # (N,)
    return gap.new_zeros(len(lengths)).index_add(0, whose, gap).exp()[whose]


def k3(gap: Tensor) -> Tensor:
    """Schulman's estimator of a KL divergence from the gap of log-probabilities, log q − log p, at tokens drawn from p."""
    return gap.exp() - gap - 1


def reinforce(
    frozen: Frozen, tile: Sequence[Reinforce], starts: Sequence[Start], step_tokens: int, logit_rows: int
) -> tuple[Bank, BankAdamW, list[int], Tensor]:
    """The trained bank, its optimizer, the tokens that each request trained on, and its (loss, KL, clipped share). (K, 3)"""
    lora, objective = tile[0].lora, tile[0].objective
    bank = Bank(frozen.model, lora, len(tile))
    bank.initialise([r.seed for r in tile])
    for k, (adapter, _) in enumerate(starts):
        if adapter:
            bank.put(k, adapter)
    samples = [[encoded(frozen, s) for s in r.samples] for r in tile]
    plans = [plan(len(r.samples), lora, r.seed) for r in tile]
    optimizer = BankAdamW(bank.parameters(), [lora] * len(tile), [len(p) for p in plans])
    for k, (_, moments) in enumerate(starts):
        if moments:
            optimizer.put(k, moments)
    tokens = [0] * len(tile)
    told = torch.zeros(len(tile), 4, device=frozen.device)  # loss of all steps; of the last epoch: KL, clipped tokens, tokens
    with bank.attached():
        for step in range(max(map(len, plans), default=0)):
            active = [k for k, p in enumerate(plans) if step < len(p)]
            for group in passes([(k, [samples[k][s] for s in plans[k][step]]) for k in active], step_tokens, frozen.shares):
                sums, _ = backward(
                    frozen,
                    bank,
                    group,
                    step_tokens,
                    logit_rows,
                    loss=lambda rows, *_: weigher(rows, objective),
                    temperature=objective.temperature,
                    entropy=sharpening(objective),
                )
                for (k, batch), found in zip(group, sums, strict=True):
                    last = step >= len(plans[k]) - len(plans[k]) // lora.epochs
                    told[k, 0] += found[0] / len(plans[k])
                    told[k, 1:] += found[1:] * last
                    tokens[k] += sum(len(s.ids) for s in batch)
            optimizer.step(active, step)
    return bank, optimizer, tokens, torch.stack([told[:, 0], *(told[:, 1:3] / told[:, 3:].clamp(min=1)).T], dim=1).cpu()


def weigher(rows: Sequence[tuple[int, Encoded]], objective: Objective) -> Weigh:
    """The surrogate's loss and derivative at the tokens of these rows."""
    each = [d.values for _, d in rows if d.values is not None]

    def weigh(logprobs: Tensor) -> tuple[Tensor, Tensor]:
        old, advantages, weights, reference = torch.cat(each).to(logprobs.device, logprobs.dtype).T  # (N,) each
        lengths = torch.tensor([len(v) for v in each], device=logprobs.device)
        with torch.enable_grad():
            variable = logprobs.detach().requires_grad_()
            loss = surrogate(variable, old, advantages, reference, objective, lengths) * weights
            [slope] = torch.autograd.grad(loss.sum(), variable)
        ratio = ratios(logprobs - old, objective, lengths)
        clipped = (ratio < 1 - objective.clip_low) | (ratio > 1 + objective.clip_high)
        return torch.stack([loss.detach(), k3(logprobs - old), clipped.to(loss.dtype), torch.ones_like(loss)], dim=1), -slope

    return weigh


def sharpening(objective: Objective) -> Callable[[Sequence[tuple[int, Encoded]]], Tensor] | None:
    """What the entropy at the tokens of these rows weighs in the loss; None without an entropy term."""
    if not objective.entropy:
        return None
    return lambda rows: objective.entropy * torch.cat([d.values[:, WEIGHTS] for _, d in rows if d.values is not None])


def encoded(frozen: Frozen, sample: Sample) -> Encoded:
    """A sample as one row: its prompt, then its own tokens, which carry loss."""
    start = frozen.encode_prompt(sample.prompt, sample.chat)
    reference = sample.reference or (0.0,) * len(sample.ids)
    values = torch.tensor([sample.logprobs, sample.advantages, sample.weights, reference], dtype=torch.float64).T  # (T, 4)
    return Encoded([*start, *sample.ids], len(start), values=values)
