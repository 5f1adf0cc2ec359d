"""A GPU computes what a processor computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selfimprove.models import Document, Generate, Lora, Models, Score, Train, generate
from selfimprove.models.torch_engine import TorchEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADER = " ".join(f"w{i}" for i in range(20))
PROMPTS = ("w3 w4 w5", "w9", "", HEADER, f"{HEADER} w30", f"{HEADER} w31 w32")


@pytest.mark.parametrize("changes", [{}, {"first_layer": 1, "batch": 2, "schedule": "linear"}], ids=["default", "upper layers"])
def test_adapters_train_as_on_a_processor(build: Callable[..., Models], changes: dict[str, Any]) -> None:
    lora = Lora(**{"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj", "down_proj"), "learning_rate": 5e-3, "epochs": 3, **changes})
    found = []
    for device in ("cpu", "cuda"):
        layer = build(device, device=device, dtype="float64")
        requests = [Train(layer.root, tuple(Document(f"w{i} w{j} w{i + j}", prompt="w3" * (j % 2)) for j in range(2 + i)), lora, i) for i in range(5)]
        found.append([layer.adapter(t.policy.digest) for t in layer.train(requests)])
    for one, two in zip(*found, strict=True):
        assert all((one[n] - w).norm() <= 1e-4 * w.norm() for n, w in two.items())  # Llama's norm goes through float32, and Adam enlarges rounding


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("rows", [2, 64])
def test_greedy_texts_are_those_of_a_processor(school: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rows: int, far: int) -> None:
    monkeypatch.setattr(generate, "LONG", 2)
    monkeypatch.setattr(generate, "FAR", far)
    one = school(device="cuda", rows=rows)
    for prompts in (PROMPTS[:3], PROMPTS[3:]):
        asked = [(k, p, 3 + i + far % 7) for k in range(4) for i, p in enumerate(prompts)]
        found = one.layer.generate([Generate(one.policies[k], p, n, temperature=0) for k, p, n in asked])
        assert [c.text for c in found] == [one.peers[k].text(p, n) for k, p, n in asked]


def test_likelihoods_are_those_of_a_processor(school: Callable[..., Any]) -> None:
    one = school(device="cuda")
    asked = [(k, p, c) for k in range(4) for p in PROMPTS for c in ("w8", "", "w1 w2 w3 w4 w5", "w1 w2")]
    found = one.layer.score([Score(one.policies[k], p, c) for k, p, c in asked])
    assert [x.logprob for x in found] == pytest.approx([one.peers[k].logprob(p, c) for k, p, c in asked], rel=1e-4, abs=1e-4)


def test_bfloat16_is_the_default_and_learns(engines: Callable[..., TorchEngine], build: Callable[..., Models]) -> None:
    layer = build(device="cuda", dtype="auto")
    assert engines(device="cuda", dtype="auto").dtype == torch.bfloat16
    [trained] = layer.train([Train(layer.root, (Document("w3 w4 w5 w6"),), Lora(2, 4, ("q_proj", "down_proj"), 0.05, 20))])
    before, after = (layer.score([Score(p, "w3", "w4 w5 w6")])[0].logprob for p in (layer.root, trained.policy))
    assert after > before
    assert layer.generate([Generate(trained.policy, "w3", 4)])[0].tokens >= 1
    with layer.open(trained.policy) as model:
        assert model.device.type == "cuda"
