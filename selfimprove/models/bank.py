"""Many adapters over one frozen model, and rows of different lengths without padding.

A step's sequences are laid end to end as one row of T tokens, so every linear module works on real tokens
only. Attention sees them as padded rows again (`packed_attention`), and each adapter sees its own
tokens (`Layout`): both are gathers, and their cost is small next to the linear modules'.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora

ATTENTION = "selfimprove_packed"


class Ragged:
    """R rows of different lengths laid end to end: T tokens in all, L in the longest row."""

    def __init__(self, lengths: Sequence[int]) -> None:
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        columns = torch.arange(int(sizes.max()))
        self.mask = columns[None] < sizes[:, None]  # (R, L)
        self.gather = torch.where(self.mask, starts[:, None] + columns, 0).flatten()  # (R·L,) positions in T; 0 for padding
        self.scatter = self.mask.flatten().nonzero().squeeze(1)  # (T,) positions in R·L
        self.rows, self.width = self.mask.shape
        self.positions = columns.expand(self.rows, -1)[self.mask]  # (T,) position of each token in its row
        self.full = bool(self.mask.all())

    def pad(self, tokens: Tensor) -> Tensor:
        """(T, d) -> (R, L, d)"""
        if self.full:
            return tokens.view(self.rows, self.width, -1)
        moved: Tensor = _Move.apply(tokens, self.gather, self.scatter, None)  # type: ignore[no-untyped-call]
        return moved.view(self.rows, self.width, -1)

    def flat(self, rows: Tensor) -> Tensor:
        """(R, L, d) -> (T, d)"""
        if self.full:
            return rows.reshape(self.rows * self.width, -1)
        rows = rows.reshape(self.rows * self.width, -1)
        moved: Tensor = _Move.apply(rows, self.scatter, self.gather, self.mask.view(-1, 1))  # type: ignore[no-untyped-call]
        return moved


class _Move(torch.autograd.Function):
    """``x[there]``, whose gradient is ``g[back]``: a gather both ways, since no token is used twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, mask: Tensor | None) -> Tensor:
        ctx.back, ctx.mask = back, mask
        return x.index_select(0, there.to(x.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.back.to(grads[0].device))
        return (grad if ctx.mask is None else grad * ctx.mask.to(grad.device)), None, None, None


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention within each row of a `Ragged` layout, all of which see what the cache held before.

    Plain SDPA where no layout is given.
    """
    ragged: Ragged | None = kwargs.pop("ragged", None)
    if ragged is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain

    def rows(x: Tensor) -> Tensor:  # (1, H, T, D) -> (R, H, L, D)
        heads, size = x.shape[1], x.shape[3]
        padded = ragged.pad(x[0].transpose(0, 1).reshape(-1, heads * size))
        return padded.view(ragged.rows, ragged.width, heads, size).transpose(1, 2)

    shared = key.shape[2] - query.shape[2]  # keys of a prefix that all rows have in common
    q, k, v = rows(query), rows(key[:, :, shared:]), rows(value[:, :, shared:])
    mask = None
    if shared:
        k, v = (torch.cat([whole[:, :, :shared].expand(ragged.rows, -1, -1, -1), own], dim=2) for whole, own in ((key, k), (value, v)))
        mask = torch.ones(ragged.width, shared + ragged.width, dtype=torch.bool, device=q.device).tril(shared)
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=kwargs.get("scaling"), enable_gqa=grouped)
    return ragged.flat(out.transpose(1, 2).reshape(ragged.rows, ragged.width, -1)).view(1, query.shape[2], q.shape[1], -1), None


AttentionInterface.register(ATTENTION, packed_attention)


class Bank:
    """K low-rank adapters of one shape on the linear modules of a frozen model.

    Weights are two stacks per module, A (K, rank, in) and B (K, out, rank), in float32 or better; the modules' outputs
    get ``(x Aᵀ) Bᵀ · alpha / rank`` of each token's own adapter added by forward hooks.
    """

    def __init__(self, model: nn.Module, lora: Lora, count: int) -> None:
        self.lora, self.count, self.scale = lora, count, lora.alpha / lora.rank
        self.modules = target_modules(model, lora)
        weight = next(iter(self.modules.values())).weight
        options: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.a = {n: torch.zeros(count, lora.rank, m.in_features, **options) for n, m in self.modules.items()}
        self.b = {n: torch.zeros(count, m.out_features, lora.rank, **options) for n, m in self.modules.items()}
        self._layout: Ragged | None = None
        self._rows: slice = slice(0, count)
        self._last: tuple[Tensor, Tensor] | None = None

    def initialise(self, seeds: Sequence[int]) -> None:
        """PEFT's initial weights, from one seed per adapter: A uniform (Kaiming, a = √5), B zero."""
        for k, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for stack in self.a.values():
                bound = 1 / math.sqrt(stack.shape[2])
                stack[k] = torch.rand(stack.shape[1:], generator=generator).mul_(2 * bound).sub_(bound)

    def load(self, k: int, weights: Mapping[str, Tensor]) -> None:
        """Put an adapter in PEFT's names into slot k."""
        for name in self.modules:
            self.a[name][k] = weights[peft_name(name, "A")]
            self.b[name][k] = weights[peft_name(name, "B")]

    def unload(self, k: int) -> dict[str, Tensor]:
        """The adapter of slot k, in PEFT's names."""
        found = {}
        for name in self.modules:
            found[peft_name(name, "A")] = self.a[name][k].detach().cpu().clone()
            found[peft_name(name, "B")] = self.b[name][k].detach().cpu().clone()
        return found

    def parameters(self) -> list[Tensor]:
        return [*self.a.values(), *self.b.values()]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While inside, the model's target modules add their adapters' outputs."""
        handles = [m.register_forward_hook(self._hook(n)) for n, m in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def use(self, layout: Ragged, rows: slice) -> None:
        """From now on, row i of `layout` holds the tokens of adapter ``rows.start + i``."""
        self._layout, self._rows, self._last = layout, rows, None

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert self._layout is not None
            x = args[0]
            if self._last is None or self._last[0] is not x:  # q, k and v (gate and up) read the same tensor
                self._last = (x, self._layout.pad(x.reshape(-1, x.shape[-1])))
            rows = self._last[1]
            a, b = self.a[name], self.b[name]
            if self._rows != slice(0, self.count):
                a, b = a[self._rows], b[self._rows]
            low = torch.bmm(rows.to(a.dtype), a.transpose(1, 2))  # (K, L, rank)
            high = torch.bmm(low * self.scale, b.transpose(1, 2))  # (K, L, out)
            return output + self._layout.flat(high).view(output.shape).to(output.dtype)

        return add


def target_modules(model: nn.Module, lora: Lora) -> dict[str, nn.Linear]:
    """The linear modules that an adapter sits on, by name. Raises: ConfigError where the model has none of that name."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.targets and _layer(name) >= lora.first_layer:
            found[name] = module
    if missing := set(lora.targets) - {n.rpartition(".")[2] for n in found}:
        have = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ConfigError(f"the model has no linear module {sorted(missing)} in layer {lora.first_layer} or above; it has {have}")
    return found


def peft_name(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


def _layer(name: str) -> int:
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    return numbers[0] if numbers else 0
