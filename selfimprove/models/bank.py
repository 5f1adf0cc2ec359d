"""Many adapters over one frozen model in one pass: the base weights are read once, and every token meets its own adapter."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfimprove.errors import ConfigError
from selfimprove.models.api import Lora
from selfimprove.models.packing import Ragged

FEW = 16
"""Rows of an adapter up to which products of rank 1 are taken element by element."""


class Bank:
    """K low-rank adapters of one shape on the linear modules of a frozen model.

    Weights are two stacks per module, A (K, rank, in) and B (K, out, rank), in float32 or better where they train and in the
    model's type where they only serve. The modules' outputs get ``(x Aᵀ) Bᵀ · alpha / rank`` of each token's own adapter
    added by forward hooks, computed in the model's type.
    """

    def __init__(self, model: nn.Module, lora: Lora, count: int, trains: bool = True) -> None:
        self.lora, self.count, self.scale = lora, count, lora.alpha / lora.rank
        self.modules = target_modules(model, lora)
        weight = next(iter(self.modules.values())).weight
        options: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32) if trains else weight.dtype}
        self.a = {n: torch.zeros(count, lora.rank, m.in_features, **options) for n, m in self.modules.items()}
        self.b = {n: torch.zeros(count, m.out_features, lora.rank, **options) for n, m in self.modules.items()}
        self._layout: Ragged | None = None
        self._rows: slice = slice(0, count)
        self._more = False
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def initialise(self, seeds: Sequence[int]) -> None:
        """PEFT's initial weights, from one seed per adapter: A uniform (Kaiming, a = √5), B zero."""
        for k, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for stack in self.a.values():
                bound = 1 / math.sqrt(stack.shape[2])
                stack[k] = torch.rand(stack.shape[1:], generator=generator).mul_(2 * bound).sub_(bound)

    def put(self, slot: int, adapter: Mapping[str, Tensor]) -> None:
        """Put one adapter in PEFT's names into a slot. Raises: ConfigError, where it has another shape."""
        for name in self.modules:
            for which, stack in (("A", self.a[name]), ("B", self.b[name])):
                found = adapter.get(peft_name(name, which))
                if found is None or found.shape != stack[slot].shape:
                    raise ConfigError(
                        f"the policy's adapter has another rank or other targets than the lora that shall train it ({name}); make them the same"
                    )
                stack[slot].copy_(found)

    def unload(self) -> list[dict[str, Tensor]]:
        """The adapters by slot, in PEFT's names."""
        found: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        for name in self.modules:
            for which, stack in (("A", self.a[name]), ("B", self.b[name])):
                host = stack.detach().to("cpu", copy=True)
                for k, adapter in enumerate(found):
                    adapter[peft_name(name, which)] = host[k]
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

    def use(self, layout: Ragged, rows: slice | None = None, more: bool = False) -> None:
        """From now on, row i of `layout` holds the tokens of adapter ``rows.start + i``; of adapter i where `rows` is None.

        With `more`, a backward pass adds to the adapters' gradients, which it replaces otherwise.
        """
        self._layout, self._rows, self._more, self._last = layout, rows or slice(0, self.count), more, None

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            assert self._layout is not None
            x = args[0]
            if self._last is None or self._last[0] is not x:  # q, k and v (gate and up) read the same tensor
                with torch.no_grad():
                    self._last = (x, self._layout.pad(x.reshape(-1, x.shape[-1])), self._layout.mask[..., None].to(x.dtype) * self.scale)
            added: Tensor = _Adapted.apply(output, x, self.a[name], self.b[name], self._last[1], self._last[2], self._layout, self._rows, self._more)  # type: ignore[no-untyped-call]
            return added

        return add


class _Adapted(torch.autograd.Function):
    """A module's output plus that of every token's own adapter, in place: nothing else needs the module's own output.

    Written out because gradients of adapters are the largest tensors here after logits: they go from the model's type straight
    into ``a.grad`` and ``b.grad``, whose earlier content they replace unless there is `more`, without a copy in between. `weight` is the
    adapters' scale, and 0 at padding. (K, L, 1)
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, padded: Tensor, weight: Tensor, layout: Ragged, rows: slice, more: bool
    ) -> Tensor:
        low_a, low_b = a[rows].to(padded.dtype), b[rows].to(padded.dtype)
        narrow, few = low_a.shape[1] == 1, padded.shape[1] <= FEW  # batched products of rank 1, or of few rows, cost more than they compute
        low = (padded * low_a).sum(2, keepdim=True) if narrow and few else torch.bmm(padded, low_a.transpose(1, 2))  # (K, L, rank)
        low.mul_(weight)
        ctx.mark_dirty(output)
        ctx.save_for_backward(padded, weight, low, low_a, low_b)
        ctx.a, ctx.b, ctx.layout, ctx.rows, ctx.more, ctx.shape = a, b, layout, rows, more, x.shape
        across = low_b.transpose(1, 2)  # (K, rank, out)
        if layout.full:
            into = output.view(*low.shape[:2], -1)  # (K, L, out)
            into.addcmul_(low, across) if narrow else into.baddbmm_(low, across)
            return output
        high = low * across if narrow else torch.bmm(low, across)
        return output.add_(layout.flat(high).view(output.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padded, weight, low, low_a, low_b = ctx.saved_tensors
        layout: Ragged = ctx.layout
        high = layout.pad(grads[0].reshape(-1, grads[0].shape[-1]))  # (K, L, out)
        back = torch.bmm(high, low_b).mul_(weight)  # (K, L, rank)
        for stack, grad in ((ctx.b, torch.bmm(high.transpose(1, 2), low)), (ctx.a, torch.bmm(back.transpose(1, 2), padded))):
            if ctx.more:
                stack.grad[ctx.rows] += grad
            else:
                stack.grad[ctx.rows] = grad
        x = layout.flat(torch.bmm(back, low_a)).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return grads[0], x, *[None] * 7


def target_modules(model: nn.Module, lora: Lora) -> dict[str, nn.Linear]:
    """The linear modules that an adapter sits on, by name; the head, which is no part of a layer, is none of them.

    Raises: ConfigError, where the model has none of that name.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and _layer(n) >= 0}
    found = {n: m for n, m in linear.items() if n.rpartition(".")[2] in lora.targets and _layer(n) >= lora.first_layer}
    if missing := set(lora.targets) - {n.rpartition(".")[2] for n in found}:
        have = sorted({n.rpartition(".")[2] for n in linear})
        raise ConfigError(f"the model has no linear module {sorted(missing)} in layer {lora.first_layer} or above; it has {have}")
    return found


def peft_name(module: str, which: str) -> str:
    return f"base_model.model.{module}.lora_{which}.weight"


def _layer(name: str) -> int:
    """The layer of a module; -1 for what is in none."""
    return int(next((p for p in name.split(".") if p.isdigit()), -1))
