from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from selfimprove import config
from selfimprove.errors import ConfigError
from selfimprove.models import Document, Generate, Lora, Models, Train
from selfimprove.models.hub import weights_digest
from selfimprove.models.torch_engine import TorchEngine

Build = Callable[..., Models]


def settings(**changes: Any) -> Lora:
    fields: dict[str, Any] = {
        "rank": 4,
        "alpha": 8,
        "targets": ("q_proj", "v_proj", "down_proj"),
        "learning_rate": 1e-2,
        "epochs": 3,
        "trainer": "trl",
    }
    return Lora(**{**fields, **changes})


def documents(count: int = 5) -> tuple[Document, ...]:
    """Texts of different lengths; every second one after a prompt."""
    return tuple(Document(" ".join(f"w{(7 * i + j * j) % 46}" for j in range(3 + i)), prompt="w3 w4" if i % 2 else "") for i in range(count))


def trained(models: Models, lora: Lora, seed: int = 5) -> tuple[dict[str, torch.Tensor], int, float]:
    [done] = models.train([Train(models.root, documents(), lora, seed)])
    return dict(models.adapter(done.policy.digest)), done.tokens, done.loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 2, "schedule": "linear", "warmup": 2, "first_layer": 1},
        {"batch": 3, "warmup": 3, "weight_decay": 0.1, "max_norm": 0.05},
        {"max_norm": 0.0, "epochs": 1},
        {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "merge": True},
    ],
    ids=["plain", "linear", "clipped", "unclipped", "merged"],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_trl_and_the_bank_train_the_same_weights(build: Build, dtype: str, changes: dict[str, Any]) -> None:
    """To 1e-4 of each matrix's norm: TRL's loss is in float32 whatever the weights are, and Adam enlarges rounding where gradients are tiny."""
    models = build(dtype=dtype)
    changes["learning_rate"] = 1e-3
    weights, tokens, loss = trained(models, settings(**changes))
    expected, expected_tokens, expected_loss = trained(models, settings(**changes, trainer="bank"))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert (weights[name] - value).norm() < 1e-4 * value.norm()
    assert tokens == expected_tokens
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_the_model_stays_as_it_was(build: Build) -> None:
    models = build()
    with models.open(models.root) as model:
        before = (
            weights_digest(model),
            model.config.to_dict(),
            model.generation_config.to_dict(),
            set(vars(model)),
            [n for n, _ in model.named_modules()],
        )
        tokenizer = dict(models.engine.tokenizer.special_tokens_map)  # type: ignore[attr-defined]
    trained(models, settings())
    with models.open(models.root) as model:
        after = (
            weights_digest(model),
            model.config.to_dict(),
            model.generation_config.to_dict(),
            set(vars(model)),
            [n for n, _ in model.named_modules()],
        )
        assert after == before
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert dict(models.engine.tokenizer.special_tokens_map) == tokenizer  # type: ignore[attr-defined]


def test_equal_seeds_give_equal_bytes_and_others_do_not(build: Build) -> None:
    one, again, other = trained(build("one"), settings()), trained(build("again"), settings()), trained(build("other"), settings(), seed=6)
    assert one[1:] == again[1:]
    assert all(torch.equal(v, again[0][n]) for n, v in one[0].items())
    assert not all(torch.equal(v, other[0][n]) for n, v in one[0].items())


def test_training_lowers_the_loss_in_bfloat16(build: Build) -> None:
    models = build(dtype="bfloat16")
    losses = [trained(models, settings(epochs=n))[2] for n in (1, 10)]
    assert losses[1] < 0.7 * losses[0]


def test_a_merged_adapter_is_trained_on(build: Build) -> None:
    """What lies below changes what is learnt, and both orders of trainers reach the same answers."""
    texts = []
    for lower, upper in (("trl", "bank"), ("bank", "trl")):
        models = build(lower)
        [below] = models.train([Train(models.root, documents(), settings(merge=True, trainer=lower), 1)])
        [above] = models.train([Train(below.policy, documents(3), settings(trainer=upper), 2)])
        texts.append([c.text for c in models.generate([Generate(above.policy, "w3 w4", 8, temperature=0.0)])])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("texts", [("",), ("", "w1 w2 w3")])
def test_a_document_without_anything_to_learn_is_no_error(build: Build, texts: tuple[str, ...]) -> None:
    models = build()
    [done] = models.train([Train(models.root, tuple(map(Document, texts)), settings())])
    assert all(v.isfinite().all() for v in models.adapter(done.policy.digest).values())


def test_no_epochs_leave_the_model_as_it_is(build: Build) -> None:
    models = build()
    weights, tokens, loss = trained(models, settings(epochs=0))
    assert (tokens, loss) == (0, 0.0)
    assert all((v == 0).all() for n, v in weights.items() if "lora_B" in n)


def test_it_is_an_option_of_both_loops() -> None:
    composed = config.compose(["strategy=seal", "updater.lora.trainer=trl", "editor.inner.lora.trainer=trl"])
    config.check(composed)
    assert composed.values["updater"]["lora"]["trainer"] == "trl"


def test_what_cannot_train_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'bank' or 'trl'"):
        settings(trainer="sft")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "trl" else found(name, package))
    with pytest.raises(ConfigError, match=r"pip install 'selfimprove\[trl\]'"):
        settings()


def test_it_charges_what_the_bank_charges(build: Build) -> None:
    charged = []
    for trainer in ("trl", "bank"):
        models = build(trainer)
        trained(models, settings(trainer=trainer, first_layer=1))
        charged.append({u: n for u, n in models.ledger.totals.items() if u != "seconds"})
    assert charged[0] == charged[1]


def test_every_adapter_of_a_tile(engines: Callable[..., TorchEngine], build: Build) -> None:
    models = build()
    both = models.train([Train(models.root, documents(n), settings(), n) for n in (2, 4)])
    alone = build("alone").train([Train(models.root, documents(4), settings(), 4)])
    assert both[1].loss == alone[0].loss
