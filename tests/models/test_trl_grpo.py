"""TRL's GRPOTrainer as the engine's policy gradient: the weights and moments of a bank, round after round, by one trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfimprove.errors import ConfigError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Lora, Models, Objective, Reinforce, Sample, Train
from selfimprove.models.hub import weights_digest
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

pytest.importorskip("trl")

Build = Callable[..., Models]
BANK = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 1e-3, 2, batch=3)
TRL = dataclasses.replace(BANK, trainer="trl")
PLAIN, FULL = Objective(), Objective(0.05, 0.1, 0.3, 0.7)


def samples(layer: Models, policy: Part, objective: Objective, seed: int = 0) -> tuple[Sample, ...]:
    """Ragged rollouts of a policy, every token with an advantage, a weight and a reference of its own."""
    chance = torch.Generator().manual_seed(seed)
    requests = [
        Generate(policy, p, 6, objective.temperature, seed=100 * seed + i, logprobs=True) for i, p in enumerate(["w3 w4", "w5", "w6 w7 w8", "w9"])
    ]

    def noise(count: int, scale: float) -> tuple[float, ...]:
        return tuple((scale * torch.randn(count, generator=chance)).tolist())

    def moved(x: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(a + b for a, b in zip(x, noise(len(x), 0.1), strict=True))

    return tuple(
        Sample(r.prompt, c.text, c.ids, moved(c.logprobs), noise(len(c.ids), 1.0), (0.1 * (1 + i),) * len(c.ids), moved(c.logprobs))
        for i, (r, c) in enumerate(zip(requests, layer.generate(requests), strict=True))
    )


@pytest.mark.parametrize("objective", [PLAIN, FULL], ids=["plain", "clip-kl-temperature"])
@pytest.mark.parametrize("change", [{}, {"first_layer": 1, "weight_decay": 0.1, "max_norm": 0.05}], ids=["plain", "upper"])
def test_two_rounds_of_trl_are_two_rounds_of_a_bank(build: Build, objective: Objective, change: dict[str, Any]) -> None:
    """To 1e-4 of each matrix's norm, with steps of unequal size; the second goes on with the first one's moments."""
    layer = build(dtype="float64")
    made: dict[str, list[Any]] = {}
    given = [samples(layer, layer.root, objective, seed) for seed in (0, 1)]
    for lora in (BANK, TRL):
        lora = dataclasses.replace(lora, **change)
        [first] = layer.reinforce([Reinforce(layer.root, given[0], lora, objective, seed=5)])
        [second] = layer.reinforce([Reinforce(first.policy, given[1], lora, objective, first.optimizer, seed=6)])
        made[lora.trainer] = [first, second]
    for ours, theirs in zip(made["bank"], made["trl"], strict=True):
        for kind, content in (("weights", layer.adapter), ("moments", lambda d: layer.moments(Part("optimizer", d)))):
            a, b = (content(x.policy.digest if kind == "weights" else x.optimizer.digest) for x in (ours, theirs))
            assert a.keys() == b.keys()
            assert all((a[n] - b[n]).norm() <= 1e-4 * a[n].norm() for n in a), kind
        assert ours.tokens == theirs.tokens
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-4, abs=1e-7)
        assert (theirs.kl, theirs.clipped) == pytest.approx((ours.kl, ours.clipped), rel=1e-3, abs=1e-6)


def test_a_bank_goes_on_from_trl_and_back(build: Build) -> None:
    layer = build(dtype="float64")
    given = samples(layer, layer.root, PLAIN)
    found = []
    for order in ((BANK, TRL), (TRL, BANK)):
        [first] = layer.reinforce([Reinforce(layer.root, given, order[0])])
        [second] = layer.reinforce([Reinforce(first.policy, given, order[1], optimizer=first.optimizer)])
        found.append(layer.adapter(second.policy.digest))
    assert all((found[0][n] - w).norm() <= 1e-4 * w.norm() for n, w in found[1].items())


def test_one_trainer_serves_all_rounds_and_copies_in_place(build: Build) -> None:
    layer = build("persistent", dtype="float32", rows=3)
    engine: Any = layer.engine
    given = samples(layer, layer.root, PLAIN)
    [first] = layer.reinforce([Reinforce(layer.root, given, TRL)])
    [(_, trainer)] = engine._grpo.items()
    state = trainer._optimizer.state
    places = [p.data_ptr() for p in trainer.parameters] + [state[p]["exp_avg"].data_ptr() for p in trainer.parameters]
    wrapped = trainer.trainer.model_wrapped
    layer.reinforce([Reinforce(first.policy, given, TRL, optimizer=first.optimizer)])
    assert list(engine._grpo.values()) == [trainer]
    assert trainer.trainer.model_wrapped is wrapped
    assert [p.data_ptr() for p in trainer.parameters] + [state[p]["exp_avg"].data_ptr() for p in trainer.parameters] == places


def test_a_run_that_goes_on_in_another_process_makes_the_same_bits(build: Build, tiny: Path) -> None:
    """The second round by the trainer of the first, and by a trainer that is made for it."""
    layer = build()
    given = samples(layer, layer.root, FULL)
    [first] = layer.reinforce([Reinforce(layer.root, given, TRL, FULL)])
    [second] = layer.reinforce([Reinforce(first.policy, given, TRL, FULL, first.optimizer)])
    before = {**layer.adapter(second.policy.digest), **layer.moments(second.optimizer)}
    [tile] = [p for p in layer.folder.glob("tiles/*/*.safetensors") if layer._made[second.policy.digest][0] in p.name]
    tile.unlink()
    fresh = Models(TorchEngine(str(tiny), dtype="float32"), layer.folder, Ledger())
    after = {**fresh.adapter(second.policy.digest), **fresh.moments(second.optimizer)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_it_sees_what_is_merged_below(build: Build) -> None:
    """The trainer was made over the root; over merged weights it is still the bank's equal."""
    layer = build(dtype="float64")
    given = samples(layer, layer.root, PLAIN)
    layer.reinforce([Reinforce(layer.root, given, TRL)])
    [merged] = layer.train([Train(layer.root, (Document("w1 w2 w3"),), dataclasses.replace(BANK, merge=True, learning_rate=0.05))])
    a, b = (layer.adapter(layer.reinforce([Reinforce(merged.policy, given, lora)])[0].policy.digest) for lora in (BANK, TRL))
    assert all((a[n] - b[n]).norm() <= 1e-4 * a[n].norm() for n in a)


def test_the_model_stays_as_it_was(build: Build) -> None:
    layer = build()
    engine: Any = layer.engine
    before = dict(engine.tokenizer.special_tokens_map)
    given = samples(layer, layer.root, PLAIN)
    with layer.open(layer.root) as model:
        digest, config = weights_digest(model), model.config.to_dict()
    layer.reinforce([Reinforce(layer.root, given, TRL)])
    with layer.open(layer.root) as model:
        assert (weights_digest(model), model.config.to_dict()) == (digest, config)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not any(m.training or m._forward_hooks for m in model.modules())
    assert dict(engine.tokenizer.special_tokens_map) == before


def test_what_does_not_fit_is_refused(build: Build) -> None:
    layer = build()
    given = samples(layer, layer.root, PLAIN)
    [first] = layer.reinforce([Reinforce(layer.root, given, TRL)])
    with pytest.raises(ConfigError, match="another rank or other targets"):
        layer.reinforce([Reinforce(first.policy, given, dataclasses.replace(TRL, rank=2, alpha=TRL.alpha * 2 / TRL.rank))])
    with pytest.raises(ConfigError, match="no entropy term"):
        Reinforce(layer.root, given, TRL, Objective(entropy=0.1))
