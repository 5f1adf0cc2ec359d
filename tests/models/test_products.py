"""Weights that are laid out for the processor multiply as the modules do, follow their changes, and stay out of the way elsewhere."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from selfimprove.models import Document, Generate, Lora, Train, products
from selfimprove.models.torch_engine import TorchEngine

Engines = Callable[..., TorchEngine]
TYPES = [d for d in (torch.bfloat16, torch.float32) if products._offered(d)]
offered = pytest.mark.skipif(not TYPES, reason="torch offers no laid-out products on this processor")
in_bfloat16 = pytest.mark.skipif(torch.bfloat16 not in TYPES, reason="torch offers no laid-out products in bfloat16 on this processor")


def linear(inputs: int, outputs: int, bias: bool, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@offered
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(0, 70),
    inputs=st.integers(1, 100),
    outputs=st.integers(1, 100),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_products_and_gradients_are_the_modules(dtype: torch.dtype, rows: int, inputs: int, outputs: int, bias: bool, seed: int) -> None:
    """To the rounding of the type, over ragged shapes."""
    module = linear(inputs, outputs, bias, seed, dtype)
    laid = products.lay_out([module], head=module)[module]
    x, y = (torch.randn(1, rows, inputs).to(dtype).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    ours, theirs = laid(x), module(y)
    assert ours.shape == theirs.shape
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    assert x.grad is not None
    assert y.grad is not None
    close = 0.01 if dtype == torch.bfloat16 else 1e-6
    for a, b in ((ours, theirs), (x.grad, y.grad)):
        assert (a.float() - b.float()).norm() <= close * (b.float().norm() + 0.1)


@offered
def test_a_changed_weight_is_followed() -> None:
    module = linear(32, 48, False, dtype=TYPES[0])
    laid = products.lay_out([module], module)[module]
    x = torch.randn(5, 32).to(TYPES[0])
    before = laid(x)
    module.weight.mul_(-1)
    laid.forget()
    assert torch.equal(laid(x), -before)


@in_bfloat16
def test_merging_changes_what_the_engine_computes_and_undoing_it_too(build: Callable[..., object]) -> None:
    layer = build(dtype="bfloat16")
    lora = Lora(4, 64, ("q_proj", "down_proj"), 0.3, 8, merge=True)
    ask = [Generate(layer.root, "w3 w4 w5", 12, temperature=0.0)]  # type: ignore[attr-defined]
    before = layer.engine.generate(ask, layer)  # type: ignore[attr-defined]
    policy = layer.train([Train(layer.root, (Document("w7 w7 w7 w7 w7 w7"),), lora)])[0].policy  # type: ignore[attr-defined]
    merged = layer.engine.generate([Generate(policy, "w3 w4 w5", 12, temperature=0.0)], layer)  # type: ignore[attr-defined]
    assert merged[0] != before[0]
    assert layer.engine.generate(ask, layer) == before  # type: ignore[attr-defined]


@offered
def test_a_lent_model_has_its_own_products(engines: Engines) -> None:
    """So that whoever opens a policy may train it, or change it."""
    frozen = engines(dtype=str(TYPES[0]).removeprefix("torch.")).frozen
    with frozen.plain() as model:
        assert not any("forward" in vars(m) for m in model.modules())
    assert any("forward" in vars(m) for m in frozen.model.modules())


@offered
def test_an_engine_that_nobody_has_is_gone_at_once(tiny: Path) -> None:
    """Not only at a collection of cycles, which may be several models later."""
    gc.collect()
    gc.disable()
    try:
        engine = TorchEngine(str(tiny), dtype=str(TYPES[-1]).removeprefix("torch."), device="cpu")
        engine.frozen.logits(engine.frozen.packed([[1, 2, 3]]))
        model = weakref.ref(engine.frozen.model)
        del engine
        assert model() is None
    finally:
        gc.enable()


def test_other_types_and_large_models_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    body, head = (linear(8, 8, False, dtype=torch.float32) for _ in range(2))
    assert products.lay_out([body]) == {}
    assert products.lay_out([linear(8, 8, False, dtype=torch.float64)], head) == {}
    if products._offered(torch.float32):
        assert list(products.lay_out([body, head], head)) == [head]
    monkeypatch.setattr(products, "MOST_BYTES", 8 * 8 * 2 - 1)
    assert products.lay_out([linear(8, 8, False)]) == {}


def test_a_torch_without_the_operators_is_no_error(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def missing(*_: object) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_reorder", missing)
    assert products.lay_out([linear(8, 8, False)]) == {}
