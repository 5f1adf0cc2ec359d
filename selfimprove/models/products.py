"""Products with weights that do not train: laid out once as the processor's kernels want them, instead of at every call.

oneDNN reorders a plain bfloat16 weight each time it multiplies it, which shows where rows are few; in float32, which torch multiplies by
another library, it shows for the head, by far the widest weight (decision 0010). torch offers the reordered form only where `torch.compile`
freezes a graph; its operator is called here directly, and is left alone where it is missing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOST_BYTES = 2**29
"""Weights of more bytes than this stay plain: the laid-out forms are two more copies of them."""


class Laid:
    """A linear module's weight in the processor's layout, for products and for their gradients, each from its first use on."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = weakref.ref(module)  # which has this as its forward; a cycle would keep whole models until a collection
        self.forget()

    @property
    def module(self) -> nn.Linear:
        module = self._module()
        assert module is not None, "a product outlived its module"
        return module

    def forget(self) -> None:
        """Lay the weight out anew when it is next used: it has changed."""
        self._there: Tensor | None = None
        self._back: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        rows = x.reshape(-1, x.shape[-1])
        product: Tensor = _Product.apply(rows, self)  # type: ignore[no-untyped-call]
        return product.view(*x.shape[:-1], product.shape[-1])

    def there(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)"""
        if self._there is None:
            self._there = _reorder(self.module.weight)
        return _multiply(x, self._there, self.module.bias)

    def back(self, grad: Tensor) -> Tensor:
        """(N, out) -> (N, in)"""
        if self._back is None:
            self._back = _reorder(self.module.weight.T)
        return _multiply(grad, self._back, None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, laid: Laid) -> Tensor:
        ctx.laid = laid
        return laid.there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.laid.back(grads[0]), None


def lay_out(modules: Iterable[nn.Linear], head: nn.Module | None = None) -> dict[nn.Linear, Laid]:
    """The modules for which a layout pays: in bfloat16 all, in float32 the head. Empty where processor, torch or the weights' size offer no gain."""
    chosen = [m for m in modules if m.weight.dtype == torch.bfloat16 or (m is head and m.weight.dtype == torch.float32)]
    weights = [m.weight for m in chosen]
    if any(w.device.type != "cpu" for w in weights) or sum(w.nbytes for w in weights) > MOST_BYTES:
        return {}
    return {m: Laid(m) for m in chosen} if all(_offered(dtype) for dtype in {w.dtype for w in weights}) else {}


def _reorder(weight: Tensor) -> Tensor:
    with torch.no_grad():
        laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(memory_format=torch.contiguous_format), 512)
    return laid


def _multiply(x: Tensor, laid: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, laid, bias, "none", [], "")
    return product


def _offered(dtype: torch.dtype) -> bool:
    """Whether torch's operators are there and compute what they should."""
    try:
        weight, x = (torch.linspace(-1, 1, 64 * rows).view(rows, 64).to(dtype) for rows in (32, 16))
        return torch.allclose(_multiply(x, _reorder(weight), None).float(), x.float() @ weight.float().T, rtol=0.02, atol=0.05)
    except (AttributeError, RuntimeError, TypeError):
        return False
