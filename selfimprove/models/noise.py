"""Noise on the weights of a model, made of seeds: low-rank factors, or windows of one table of normal numbers.

The same seed makes the same noise on every device, in every process and in whatever order.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from selfimprove.errors import ConfigError
from selfimprove.identity import seed_for
from selfimprove.models.api import Lora
from selfimprove.models.bank import peft_name, target_modules
from selfimprove.models.recipes import Ascent, Perturb

LEAST = 2**22
"""The fewest numbers of a table."""
SPARE = 4
"""A table is at least this many times as long as the largest weight."""


class Table:
    """Standard normal numbers, of which full-rank noise is windows (Salimans et al. 2017, section 2.1).

    A window costs one read of memory, while drawing as many normal numbers for every layer at every token would cost more than the layer.
    """

    def __init__(self, largest: int, device: torch.device) -> None:
        size = 1 << max(LEAST, SPARE * largest).bit_length()
        self.values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
        self._copies: dict[torch.dtype, Tensor] = {}

    def window(self, seed: int, module: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise of a module's weight under a seed; a view of the table, or of its copy in a shorter type. (out, in)"""
        values, count = self._as(dtype), weight.numel()
        begin = seed_for(seed, module) % (len(values) - count + 1)
        return values[begin : begin + count].view(weight.shape)

    def _as(self, dtype: torch.dtype) -> Tensor:
        if dtype.itemsize >= self.values.dtype.itemsize:
            return self.values
        if dtype not in self._copies:
            self._copies[dtype] = self.values.to(dtype)
        return self._copies[dtype]


def factors(modules: Mapping[str, nn.Linear], seed: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Standard normal A (rank, in) and B (out, rank) for every module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, m.in_features, generator=generator), torch.randn(m.out_features, rank, generator=generator))
        for name, m in modules.items()
    }


def noise(model: nn.Module, recipe: Perturb, table: Table) -> dict[str, Tensor]:
    """What a perturbation adds to the weights: an adapter in PEFT's names (see `Perturb.lora`), or a matrix for each module's weight."""
    modules = _modules(model, recipe)
    if not recipe.rank:
        return {f"{n}.weight": table.window(recipe.seed, n, m.weight).cpu() * (recipe.sign * recipe.sigma) for n, m in modules.items()}
    found = {}
    for name, (a, b) in factors(modules, recipe.seed, recipe.rank).items():
        found[peft_name(name, "A")], found[peft_name(name, "B")] = a, b * recipe.sign
    return found


@contextlib.contextmanager
def formed(model: nn.Module, recipe: Perturb, table: Table) -> Iterator[None]:
    """While inside, every perturbed module multiplies with W + sign · σ · ε, formed in a buffer that all share as it runs.

    The weights themselves are only read, and memory grows by the largest of them.
    """
    modules = _modules(model, recipe)
    first = next(iter(modules.values())).weight
    scratch = first.new_empty(max(m.weight.numel() for m in modules.values()))
    before = {m: m.__dict__.get("forward") for m in modules.values()}
    for name, m in modules.items():
        window = table.window(recipe.seed, name, m.weight, m.weight.dtype)  # in one type with it: half the memory to read, and one kernel
        m.__dict__["forward"] = functools.partial(_product, m, window, recipe.sign * recipe.sigma, scratch[: m.weight.numel()].view(m.weight.shape))
    try:
        yield
    finally:
        for m, forward in before.items():
            if forward is None:
                del m.__dict__["forward"]
            else:
                m.__dict__["forward"] = forward


def _product(module: nn.Linear, window: Tensor, scale: float, scratch: Tensor, x: Tensor) -> Tensor:
    torch.add(module.weight, window, alpha=scale, out=scratch)
    return linear(x, scratch, module.bias)


def step(
    model: nn.Module,
    members: Sequence[Perturb],
    weights: Sequence[float],
    ascent: Ascent,
    before: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    table: Table,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is added to the loaded weights after a step, in float32, and the optimizer's moments: one module after another.

    The sums run in the order of the seeds, so members with equal weights make equal bits, in whatever order they come.

    Args:
        before: what was added before it; empty where this is the first.
        moments: by module and name; empty where they begin.
    """
    first = members[0]
    if unlike := [m for m in members if (m.rank, m.sigma, m.targets) != (first.rank, first.sigma, first.targets)]:
        raise ConfigError(
            "a step wants members with noise of one kind; got noise of rank "
            f"{first.rank} with sigma {first.sigma} beside rank {unlike[0].rank} with sigma {unlike[0].sigma}, or other targets"
        )
    shares: dict[int, float] = {}
    for member, weight in zip(members, weights, strict=True):  # both signs of a seed are one term
        shares[member.seed] = shares.get(member.seed, 0.0) + member.sign * weight
    shares = dict(sorted(shares.items()))
    modules = _modules(model, first)
    drawn = {seed: factors(modules, seed, first.rank) for seed in shares} if first.rank else {}
    added, states = {}, {}
    for name, module in modules.items():
        if first.rank:
            down = torch.cat([drawn[seed][name][0] * (share / math.sqrt(first.rank)) for seed, share in shares.items()])  # (N·r, in)
            estimate = torch.cat([drawn[seed][name][1] for seed in shares], dim=1).to(module.weight.device) @ down.to(module.weight.device)
        else:
            estimate = torch.zeros(module.weight.shape, device=module.weight.device)  # (out, in)
            for seed, share in shares.items():
                estimate.add_(table.window(seed, name, module.weight), alpha=share)
        start = before.get(f"{name}.weight")
        moved = torch.zeros_like(estimate) if start is None else start.to(estimate.device, copy=True)
        prefix = f"{name}."
        state = {n.removeprefix(prefix): _moved(v, estimate.device) for n, v in moments.items() if n.startswith(prefix)}
        state = _ascend(moved, estimate, ascent, state)
        added[f"{name}.weight"] = moved.cpu()
        states.update({f"{prefix}{n}": v.cpu() for n, v in state.items()})
    return added, states


def _ascend(weight: Tensor, gradient: Tensor, ascent: Ascent, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Moves a weight in place; the optimizer's state afterwards."""
    parameter = nn.Parameter(weight)
    parameter.grad = gradient
    optimizer: torch.optim.Optimizer
    if ascent.optimizer == "adam":
        betas = (ascent.beta_1, ascent.beta_2)
        optimizer = torch.optim.Adam([parameter], lr=ascent.learning_rate, betas=betas, maximize=True, foreach=False)
    else:
        optimizer = torch.optim.SGD([parameter], lr=ascent.learning_rate, momentum=ascent.momentum, maximize=True, foreach=False)
    if state:
        optimizer.state[parameter] = state
    optimizer.step()
    after: dict[str, Any] = optimizer.state[parameter]
    return {n: v for n, v in after.items() if isinstance(v, Tensor)}


def _moved(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; Adam wants its count of steps on the processor."""
    return value.to(device if value.dim() else "cpu", copy=True)


def _modules(model: nn.Module, recipe: Perturb) -> dict[str, nn.Linear]:
    return target_modules(model, recipe.lora or Lora(1, 1.0, recipe.targets, learning_rate=0.0, epochs=0))
