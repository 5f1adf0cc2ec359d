"""Direct preference optimisation by TRL's trainer: its loss and first step by hand, references, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Lora, Models, Pair, Prefer, Score, Train
from selfimprove.models.bank import Bank
from selfimprove.models.hub import weights_digest
from selfimprove.records import Part

from .conftest import in_peft  # type: ignore[import-not-found, unused-ignore]

pytest.importorskip("trl")

Build = Callable[..., Models]
LORA = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 1e-3, 1, batch=4, max_norm=0.0, merge=True, trainer="trl")
PAIRS = (Pair("w3 w4", "w5 w6 w7", "w8"), Pair("w9", "w1", "w2 w3 w4 w5", chat=True), Pair("w3", "w7 w7", "w8 w9"))
BETA = 0.5


def taught(layer: Models, text: str, **changes: Any) -> Part:
    [made] = layer.train([Train(layer.root, (Document(text),), Lora(4, 8, ("q_proj", "v_proj"), 0.05, 3, merge=True, **changes))])
    return made.policy


def loss_by_hand(model: Any, layer: Models, reference: Part) -> torch.Tensor:
    """−mean log σ(β (log π/π_ref (chosen) − log π/π_ref (rejected))), the end of the text being part of both."""
    frozen: Any = layer.engine.frozen  # type: ignore[attr-defined]
    total = torch.zeros((), dtype=torch.float64)
    for p in PAIRS:
        start = frozen.encode_prompt(p.prompt, p.chat)
        margin = torch.zeros((), dtype=torch.float64)
        for sign, text in ((1, p.chosen), (-1, p.rejected)):
            ids = [*frozen.encode(text), frozen.stop_id]
            logs = model(torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1].double().log_softmax(-1)
            [old] = layer.score([Score(reference, p.prompt, text, p.chat, tuple(ids))])
            margin = margin + sign * (logs.gather(1, torch.tensor(ids)[:, None]).sum() - old.logprob)
        total = total - logsigmoid(BETA * margin) / len(PAIRS)
    return total


@pytest.mark.parametrize("reference", ["itself", "another"])
def test_one_step_by_hand(build: Build, tiny: Path, reference: str) -> None:
    """The loss, and the weights after one step of AdamW along its gradient by autograd."""
    layer = build(dtype="float64")
    against = layer.root if reference == "itself" else taught(layer, "w5 w6 w7 w8")
    [made] = layer.prefer([Prefer(layer.root, against, PAIRS, LORA, BETA, seed=3)])
    frozen = layer.engine.frozen  # type: ignore[attr-defined]
    initial = Bank(frozen.model, LORA, 1)
    initial.initialise([3])
    model = in_peft(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), LORA, initial.unload()[0])
    weights = {n.replace(".default.", "."): p for n, p in model.named_parameters() if "lora_" in n}
    loss = loss_by_hand(model, layer, against)
    assert made.loss == pytest.approx(loss.item(), rel=1e-4)
    if reference == "itself":
        assert made.loss == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    torch.optim.AdamW(weights.values(), lr=LORA.learning_rate, weight_decay=0.0).step()
    for name, w in layer.adapter(made.policy.digest).items():
        assert (w - weights[name]).norm() <= 1e-4 * weights[name].norm(), name


def test_what_is_preferred_becomes_likelier(build: Build) -> None:
    layer = build()
    lora = dataclasses.replace(LORA, epochs=20, learning_rate=0.02, max_norm=1.0)
    [made] = layer.prefer([Prefer(layer.root, layer.root, PAIRS, lora, BETA)])
    texts = [(q, t) for q in PAIRS for t in (q.chosen, q.rejected)]
    before, after = ([x.logprob for x in layer.score([Score(p, q.prompt, t, q.chat) for q, t in texts])] for p in (layer.root, made.policy))
    gains = [b - a for a, b in zip(before, after, strict=True)]
    assert all(chosen > rejected for chosen, rejected in zip(gains[::2], gains[1::2], strict=True))
    assert made.loss < 0.3
    assert layer.layered(made.policy).merged == (made.policy.digest,)


def test_it_is_remembered_charged_and_made_again(build: Build) -> None:
    layer = build()
    request = Prefer(layer.root, layer.root, PAIRS, LORA, BETA)
    made = layer.prefer([request])
    spent = dict(layer.ledger.totals)
    assert spent["scored_tokens"] > 0
    assert spent["trained_tokens"] == made[0].tokens > 0
    before = dict(layer.adapter(made[0].policy.digest))
    layer.retain([])
    again = build()
    assert again.prefer([request]) == made
    assert {u: n for u, n in again.ledger.totals.items() if u != "seconds"} == {u: n for u, n in spent.items() if u != "seconds"}
    assert all(torch.equal(w, again.adapter(made[0].policy.digest)[n]) for n, w in before.items())


def test_the_model_stays_as_it_was(build: Build) -> None:
    layer = build()
    engine: Any = layer.engine
    before = dict(engine.tokenizer.special_tokens_map)
    with layer.open(layer.root) as model:
        digest, config = weights_digest(model), model.config.to_dict()
    layer.prefer([Prefer(layer.root, layer.root, PAIRS, LORA, BETA)])
    with layer.open(layer.root) as model:
        assert (weights_digest(model), model.config.to_dict()) == (digest, config)
        assert not any(m.training for m in model.modules())
    assert dict(engine.tokenizer.special_tokens_map) == before


def test_what_makes_no_sense_is_refused(build: Build) -> None:
    layer = build()
    with pytest.raises(ConfigError, match="no pairs"):
        layer.prefer([Prefer(layer.root, layer.root, (), LORA, BETA)])
    with pytest.raises(ConfigError, match="beta > 0"):
        Prefer(layer.root, layer.root, PAIRS, LORA, 0.0)
    with pytest.raises(ConfigError, match="lora.trainer=trl"):
        Prefer(layer.root, layer.root, PAIRS, dataclasses.replace(LORA, trainer="bank"), BETA)
    [live] = layer.train([Train(layer.root, (Document("w1"),), dataclasses.replace(LORA, merge=False))])
    with pytest.raises(ConfigError, match="live adapter"):
        layer.prefer([Prefer(live.policy, layer.root, PAIRS, LORA, BETA)])
