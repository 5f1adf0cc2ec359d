"""Policies between two: by hand, over merged weights, after a prune, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Interpolate, Lora, Models, Train
from selfimprove.models.adapters import between
from selfimprove.records import Part

Build = Callable[..., Models]
LORA = Lora(4, 8, ("q_proj", "v_proj"), 0.01, 2)


def trained(layer: Models, text: str, policy: Part | None = None, seed: int = 0, **changes: Any) -> Part:
    [made] = layer.train([Train(policy or layer.root, (Document(text),), dataclasses.replace(LORA, **changes), seed)])
    return made.policy


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_between_two_adapters(build: Build, share: float) -> None:
    layer = build()
    one, other = trained(layer, "w1 w2 w3"), trained(layer, "w5 w6", seed=1)
    [made] = layer.interpolate([Interpolate(one, other, share)])
    a, b, c = (layer.adapter(p.digest) for p in (one, other, made.policy))
    assert all(torch.allclose(c[n], (1 - share) * a[n] + share * b[n], atol=1e-6) for n in a)
    assert layer.layered(made.policy).live == made.policy.digest
    assert layer.lora(made.policy.digest) == LORA


def test_from_the_root_what_is_added_to_the_weights_is_scaled(build: Build) -> None:
    layer = build()
    other = trained(layer, "w1 w2 w3")
    forth, back = layer.interpolate([Interpolate(layer.root, other, 0.25), Interpolate(other, layer.root, 0.75)])
    b, c, d = (layer.adapter(p.digest) for p in (other, forth.policy, back.policy))
    for name in (n.replace(".lora_B.", ".lora_{}.") for n in b if ".lora_B." in n):
        product = c[name.format("B")] @ c[name.format("A")]
        assert torch.allclose(product, 0.25 * b[name.format("B")] @ b[name.format("A")], atol=1e-6)
        assert torch.equal(product, d[name.format("B")] @ d[name.format("A")])


def test_above_merged_weights_and_after_a_prune(build: Build) -> None:
    layer = build()
    below = trained(layer, "w8 w9", merge=True)
    one, other = trained(layer, "w1 w2", below), trained(layer, "w3", below, seed=1)
    [half] = layer.interpolate([Interpolate(one, other, 0.5)])
    [quarter] = layer.interpolate([Interpolate(one, half.policy, 0.5)])
    assert layer.layered(quarter.policy).merged == (below.digest,)
    before = dict(layer.adapter(quarter.policy.digest))
    layer.retain([])
    fresh = build()
    assert all(torch.equal(w, fresh.adapter(quarter.policy.digest)[n]) for n, w in before.items())
    assert fresh.interpolate([Interpolate(one, other, 0.5)]) == [half]


def test_it_costs_nothing(build: Build) -> None:
    layer = build()
    one, other = trained(layer, "w1"), trained(layer, "w2")
    before = dict(layer.ledger.totals)
    layer.interpolate([Interpolate(one, other, 0.5)])
    assert {u: n for u, n in layer.ledger.totals.items() if u != "seconds"} == {u: n for u, n in before.items() if u != "seconds"}


def test_what_is_not_between_anything_is_refused(build: Build) -> None:
    layer = build()
    one, merged, wide = trained(layer, "w1"), trained(layer, "w2", merge=True), trained(layer, "w1", rank=8, alpha=16)
    with pytest.raises(ConfigError, match="neither of the two"):
        layer.interpolate([Interpolate(layer.root, layer.root, 0.5)])
    with pytest.raises(ConfigError, match="different merged weights"):
        layer.interpolate([Interpolate(one, merged, 0.5)])
    with pytest.raises(ConfigError, match="other ranks or targets"):
        layer.interpolate([Interpolate(one, wide, 0.5)])
    with pytest.raises(ConfigError, match=r"alpha / rank is 2 and 20\).*train both with the same alpha and rank"):
        layer.interpolate([Interpolate(one, trained(layer, "w1", alpha=80), 0.0)])
    half = layer.interpolate([Interpolate(layer.root, trained(layer, "w1", alpha=80), 0.5)])[0].policy
    with pytest.raises(ConfigError, match="alpha / rank"):
        layer.interpolate([Interpolate(one, half, 0.5)])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Interpolate(one, one, 1.5)
    with pytest.raises(ConfigError, match="neither of the two"):
        between({}, {}, 0.5)
