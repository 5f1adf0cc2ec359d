"""Policy gradients on a bank: the loss by hand, gradients by PEFT and autograd, moments that go on, and what is rewarded becomes likelier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from selfimprove.errors import ConfigError, StorageError
from selfimprove.models import Document, Generate, Lora, Models, Objective, Reinforce, Sample, Score, Train
from selfimprove.models.bank import Bank
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.reinforce import encoded, sharpening, surrogate, weigher
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import backward
from selfimprove.records import Part

from .conftest import in_peft  # type: ignore[import-not-found, unused-ignore]

Build = Callable[..., Models]
PROMPTS = ["w3 w4", "w5", "w6 w7 w8", "w9"]
LORA = Lora(4, 8, ("q_proj", "v_proj", "down_proj"), 0.01, 1, batch=64)


def sampled(layer: Models, policy: Part, prompts: Sequence[str], reward: Callable[[str], float], seed: int = 0, **changes: Any) -> list[Sample]:
    """Rollouts of a policy as samples whose advantage is their centred reward."""
    requests = [Generate(policy, p, 6, seed=100 * seed + i, logprobs=True, **changes) for i, p in enumerate(prompts)]
    done = layer.generate(requests)
    rewards = [reward(c.text) for c in done]
    centre = math.fsum(rewards) / len(rewards)
    return [
        Sample(p, c.text, c.ids, c.logprobs, (r - centre,) * len(c.ids), (1 / len(done),) * len(c.ids))
        for p, c, r in zip(prompts, done, rewards, strict=True)
    ]


# ---- what sampling and scoring tell ----


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
def test_recorded_log_probabilities_are_those_of_transformers(school: Callable[..., Any], temperature: float) -> None:
    one = school()
    for policy, peer in zip(one.policies[:2], one.peers, strict=False):
        [c] = one.layer.generate([Generate(policy, "w3 w4", 9, temperature, seed=4, logprobs=True)])
        assert c.tokens == len(c.ids) == len(c.logprobs)
        start = one.layer.engine.frozen.encode_prompt("w3 w4", False)
        with torch.no_grad():
            logits = peer.model(torch.tensor([[*start, *c.ids]])).logits[0, len(start) - 1 : -1]
        logs = (logits / (temperature or 1.0)).log_softmax(-1)
        assert torch.allclose(torch.tensor(c.logprobs), logs.gather(1, torch.tensor(c.ids)[:, None]).squeeze(1), atol=1e-5)


def test_sampled_tokens_are_scored_as_they_were_sampled(school: Callable[..., Any]) -> None:
    """By ids, with entropy and self-certainty of every distribution, beside ordinary requests."""
    one = school()
    policy, peer = one.policies[1], one.peers[1]
    [c] = one.layer.generate([Generate(policy, "w3 w4", 9, 0.7, seed=4, logprobs=True)])
    by_ids, plain = one.layer.score([Score(policy, "w3 w4", c.text, ids=c.ids, temperature=0.7, by_token=True), Score(policy, "w3 w4", "w5 w6")])
    assert by_ids.logprobs == pytest.approx(c.logprobs, abs=1e-5)
    assert by_ids.logprob == pytest.approx(math.fsum(c.logprobs), abs=1e-4)
    assert plain.logprob == pytest.approx(peer.logprob("w3 w4", "w5 w6"), rel=1e-5)
    assert plain.logprobs == ()
    start = one.layer.engine.frozen.encode_prompt("w3 w4", False)
    with torch.no_grad():
        logs = (peer.model(torch.tensor([[*start, *c.ids]])).logits[0, len(start) - 1 : -1] / 0.7).log_softmax(-1)
    assert by_ids.entropies == pytest.approx((-(logs.exp() * logs).sum(-1)).tolist(), abs=1e-4)
    assert by_ids.certainties == pytest.approx((-logs.mean(-1)).tolist(), abs=1e-4)


def test_nothing_is_told_that_nobody_asked_for(school: Callable[..., Any]) -> None:
    one = school()
    [c] = one.layer.generate([Generate(one.layer.root, "w3", 4)])
    assert (c.ids, c.logprobs) == ((), ())


# ---- the loss ----


def test_the_surrogate_by_hand() -> None:
    """Ratios of 1, 2 and 1/2 with advantages of either sign, clipped at 0.8 and 1.3, and a KL term of weight 1/2."""
    new, old = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0 - math.log(2), -1.0 + math.log(2), -1.0 - math.log(2)])
    advantages, reference = torch.tensor([3.0, 3.0, -2.0, -2.0]), torch.tensor([-1.0, -1.0, -1.0, -1.5])
    found = surrogate(new, old, advantages, reference, Objective(0.2, 0.3, 0.5), torch.tensor([4]))
    kl = math.exp(-0.5) + 0.5 - 1
    assert found.tolist() == pytest.approx([-3.0, -3.0 * 1.3, 2.0 * 0.8, 2.0 * 2.0 + 0.5 * kl], rel=1e-6)


def test_the_surrogate_of_whole_sequences_by_hand() -> None:
    """Ratios of 2 · 1/4 and of 3/2 with advantages 2 and −1: clipped at 0.8 for the first, whose two tokens share it, free for the second."""
    gap = torch.tensor([math.log(2), -math.log(4), math.log(1.5)])
    old = torch.full((3,), -1.0)
    found = surrogate(old + gap, old, torch.tensor([2.0, 2.0, -1.0]), old, Objective(ratio="sequence"), torch.tensor([2, 1]))
    assert found.tolist() == pytest.approx([-0.5 * 2 / 2, -0.5 * 2 / 2, 1.5], rel=1e-6)


@given(st.lists(st.tuples(*[st.floats(-6, 0, allow_subnormal=False)] * 2, st.floats(-3, 3, allow_subnormal=False)), min_size=1, max_size=20))
def test_on_policy_the_gradient_is_that_of_reinforce(rows: list[tuple[float, float, float]]) -> None:
    """Where nothing has moved yet, clipping does not matter: d loss / d log π = −A."""
    values = torch.tensor(rows, dtype=torch.float64)
    logprobs = values[:, 0].clone().requires_grad_()
    surrogate(logprobs, values[:, 0], values[:, 2], values[:, 1], Objective(), torch.tensor([len(rows)])).sum().backward()
    assert logprobs.grad is not None
    assert torch.allclose(logprobs.grad, -values[:, 2])


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective(0.05, 0.1, 0.3, 0.7), Objective(0.05, 0.1, 0.3, 0.7, -0.4), Objective(0.5, 5, 0.3, 0.7, ratio="sequence")],
    ids=["plain", "clip-kl-temperature", "entropy", "sequence"],
)
def test_gradients_equal_those_of_autograd_on_all_logits(engines: Callable[..., TorchEngine], tiny: Any, objective: Objective) -> None:
    """Three adapters with ragged samples and old log-probabilities off the present ones, against PEFT one sample at a time, in float64."""
    engine = engines(dtype="float64")
    engine.frozen.reset()
    bank = Bank(engine.frozen.model, LORA, 3)
    bank.initialise(range(3))
    chance = torch.Generator().manual_seed(1)
    for stack in bank.b.values():
        stack.copy_(torch.randn(stack.shape, generator=chance, dtype=torch.float64) * 0.1)
    BankAdamW(bank.parameters(), [LORA] * 3, [1] * 3)

    def noise(n: int) -> tuple[float, ...]:
        return tuple(torch.randn(n, generator=chance, dtype=torch.float64).tolist())

    def sample(n: int) -> Sample:
        ids = tuple(torch.randint(2, 48, (n,), generator=chance).tolist())
        return Sample("w3 w4 w5", "", ids, tuple(x - 3.8 for x in noise(n)), noise(n), (0.3,) * n, tuple(x - 3.8 for x in noise(n)))

    batches = [[sample(1 + 3 * k + j) for j in range(1 + k)] for k in range(3)]
    group = [(k, [encoded(engine.frozen, s) for s in batch]) for k, batch in enumerate(batches)]
    with bank.attached():
        sums, _ = backward(
            engine.frozen, bank, group, 2**20, 4, lambda rows, *_: weigher(rows, objective), objective.temperature, sharpening(objective)
        )
    for k, batch in enumerate(batches):
        model = in_peft(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), LORA, bank.unload()[k])
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
        total = torch.zeros((), dtype=torch.float64)
        for s in batch:
            total = total + peer_loss(model, engine.frozen.encode_prompt(s.prompt, False), s, objective)
        total.backward()
        assert float(sums[k, 0]) == pytest.approx(total.item(), rel=1e-5)
        for name, p in model.named_parameters():
            if "lora_" in name:
                module = name.removeprefix("base_model.model.").partition(".lora_")[0]
                ours = (bank.a if ".lora_A." in name else bank.b)[module].grad
                assert ours is not None
                assert p.grad is not None
                assert (ours[k] - p.grad).norm() <= 1e-8 * p.grad.norm() + 1e-12, name


def peer_loss(model: Any, start: Sequence[int], s: Sample, o: Objective) -> Tensor:
    """The objective written out once more, on all logits."""
    logits = model(torch.tensor([[*start, *s.ids]])).logits[0, len(start) - 1 : -1] / o.temperature
    logs = logits.log_softmax(-1)
    logprobs, entropies = logs.gather(1, torch.tensor(s.ids)[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)
    old, advantages, weights, reference = (torch.tensor(x, dtype=torch.float64) for x in (s.logprobs, s.advantages, s.weights, s.reference))
    ratio, advantage = torch.exp(logprobs - old), advantages
    if o.ratio == "sequence":
        ratio, advantage = ratio.prod(), advantages / len(s.ids)
    gain = torch.stack([ratio * advantage, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage]).min(dim=0).values
    divergence = torch.exp(reference - logprobs) - (reference - logprobs) - 1
    loss: Tensor = ((o.beta * divergence - gain + o.entropy * entropies) * weights).sum()
    return loss


# ---- policies, moments, resumes ----


def test_two_rounds_are_two_steps_of_one_optimizer(build: Build) -> None:
    """The second goes on with the first one's weights and moments, whether or not it is told again from disk."""
    layer = build(dtype="float64")
    samples = tuple(sampled(layer, layer.root, PROMPTS, len))
    [whole] = layer.reinforce([Reinforce(layer.root, samples, dataclasses.replace(LORA, epochs=2))])
    [first] = layer.reinforce([Reinforce(layer.root, samples, LORA)])
    again = build(dtype="float64")  # another process
    assert again.reinforce([Reinforce(layer.root, samples, LORA)]) == [first]
    [second] = again.reinforce([Reinforce(first.policy, samples, LORA, optimizer=first.optimizer)])
    for name, weights in layer.adapter(whole.policy.digest).items():
        assert torch.allclose(again.adapter(second.policy.digest)[name], weights, rtol=0, atol=1e-10), name
    moments = again.moments(second.optimizer)
    assert float(moments["optimizer.step"]) == 2
    assert all(torch.allclose(moments[n].double(), m.double(), atol=1e-12) for n, m in layer.moments(whole.optimizer).items())


def test_without_its_moments_it_is_another_policy(build: Build) -> None:
    layer = build(dtype="float64")
    samples = tuple(sampled(layer, layer.root, PROMPTS, len))
    [first] = layer.reinforce([Reinforce(layer.root, samples, LORA)])
    with_them, without = layer.reinforce([Reinforce(first.policy, samples, LORA, optimizer=o) for o in (first.optimizer, None)])
    assert any((layer.adapter(with_them.policy.digest)[n] != w).any() for n, w in layer.adapter(without.policy.digest).items())


def test_pruned_weights_and_moments_are_made_again(build: Build) -> None:
    layer = build()
    samples = tuple(sampled(layer, layer.root, PROMPTS, len))
    [first] = layer.reinforce([Reinforce(layer.root, samples, LORA)])
    [second] = layer.reinforce([Reinforce(first.policy, samples, LORA, optimizer=first.optimizer)])
    before = {**layer.adapter(second.policy.digest), **layer.moments(second.optimizer)}
    layer.retain([])
    assert not list(layer.folder.glob("tiles/*/*.safetensors"))
    fresh = build()
    after = {**fresh.adapter(second.policy.digest), **fresh.moments(second.optimizer)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_it_goes_on_above_a_merged_policy_and_from_a_live_one(build: Build) -> None:
    layer = build()
    [merged] = layer.train([Train(layer.root, (Document("w1 w2 w3"),), dataclasses.replace(LORA, merge=True))])
    [live] = layer.train([Train(merged.policy, (Document("w4 w5"),), LORA)])
    samples = tuple(sampled(layer, live.policy, PROMPTS, len))
    [after] = layer.reinforce([Reinforce(live.policy, samples, LORA)])
    assert layer.layered(after.policy).merged == (merged.policy.digest,)
    a, b = (layer.adapter(p.policy.digest) for p in (live, after))
    assert 0 < max(float((a[n] - b[n]).abs().max()) for n in a) < 0.05, "one step of Adam away"


def test_policies_of_one_tile_do_not_touch_one_another(build: Build) -> None:
    layer, alone = build("together", dtype="float64"), build("alone", dtype="float64", bank=1)
    requests = []
    for k in range(3):
        samples = tuple(sampled(layer, layer.root, [f"w{k}", f"w{k + 3} w4"], len, seed=k))
        requests.append(Reinforce(layer.root, samples, LORA, seed=k))
    for request, ours in zip(requests, layer.reinforce(requests), strict=True):
        [theirs] = alone.reinforce([request])
        assert all(
            torch.allclose(layer.adapter(ours.policy.digest)[n], w, rtol=0, atol=1e-10) for n, w in alone.adapter(theirs.policy.digest).items()
        )


def test_what_is_rewarded_becomes_likelier(build: Build) -> None:
    """Ten rounds that reward a word; nothing else tells the policy about it."""
    layer = build()
    policy, optimizer = layer.root, None
    lora = dataclasses.replace(LORA, learning_rate=0.03)
    said = []
    for number in range(10):
        samples = sampled(layer, policy, ["w3 w4"] * 32, lambda text: text.split().count("w7"), seed=number)
        said.append(sum(s.text.split().count("w7") for s in samples))
        [made] = layer.reinforce([Reinforce(policy, tuple(samples), lora, optimizer=optimizer)])
        policy, optimizer = made.policy, made.optimizer
    assert said[-1] > 32 > 4 * said[0], said


def test_the_entropy_that_is_minimised_falls(build: Build) -> None:
    """EM-FT: the loss is the mean over rollouts of the mean entropy of their tokens, as scoring tells it, and it goes down."""
    layer = build()
    done = layer.generate([Generate(layer.root, p, 6, seed=i, logprobs=True) for i, p in enumerate(PROMPTS)])
    samples = tuple(
        Sample(p, c.text, c.ids, c.logprobs, (0.0,) * len(c.ids), (1 / (len(done) * len(c.ids)),) * len(c.ids))
        for p, c in zip(PROMPTS, done, strict=True)
    )

    def entropy(policy: Part) -> float:
        told = layer.score([Score(policy, s.prompt, s.text, ids=s.ids, by_token=True) for s in samples])
        return math.fsum(math.fsum(x.entropies) / len(x.entropies) for x in told) / len(told)

    [first] = layer.reinforce([Reinforce(layer.root, samples, LORA, Objective(entropy=1.0))])
    assert first.loss == pytest.approx(entropy(layer.root), rel=1e-4)
    [after] = layer.reinforce([Reinforce(layer.root, samples, dataclasses.replace(LORA, epochs=20), Objective(entropy=1.0))])
    [before] = layer.reinforce([Reinforce(layer.root, samples, dataclasses.replace(LORA, epochs=20), Objective(entropy=-1.0))])
    assert entropy(after.policy) < 0.8 * entropy(layer.root) < entropy(before.policy)


# ---- refusals ----


def test_an_adapter_of_another_shape_is_refused(build: Build) -> None:
    layer = build()
    samples = tuple(sampled(layer, layer.root, ["w3"], len))
    [first] = layer.reinforce([Reinforce(layer.root, samples, LORA)])
    with pytest.raises(ConfigError, match="another rank or other targets"):
        layer.reinforce([Reinforce(first.policy, samples, dataclasses.replace(LORA, rank=2, alpha=4))])


def test_foreign_moments_are_refused(build: Build) -> None:
    layer = build()
    samples = tuple(sampled(layer, layer.root, ["w3"], len))
    with pytest.raises(StorageError, match="was not made in"):
        layer.reinforce([Reinforce(layer.root, samples, LORA, optimizer=Part("optimizer", "0" * 32))])


@pytest.mark.parametrize("change", [{"schedule": "linear"}, {"warmup": 3}, {"merge": True}])
def test_settings_that_do_not_go_on_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="goes on from round to round"):
        Reinforce(Part("model", ""), (), dataclasses.replace(LORA, **change))


@pytest.mark.parametrize("lengths", [(2, 1, 2, 2, 0), (2, 2, 2, 2, 1), (0, 0, 0, 0, 0)])
def test_a_sample_says_something_about_every_token(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="for each of its tokens"):
        Sample("", "", *((1,) * n for n in lengths))  # type: ignore[arg-type]


def test_no_samples_are_refused(build: Build) -> None:
    layer = build()
    with pytest.raises(ConfigError, match="no samples"):
        layer.reinforce([Reinforce(layer.root, (), LORA)])


def test_an_adapter_goes_on_at_its_own_scale_only(build: Build) -> None:
    layer = build()
    sample = Sample("w3", "w4 w5", (6, 7), (-1.0, -1.0), (1.0, 1.0), (0.5, 0.5))
    [begun] = layer.reinforce([Reinforce(layer.root, (sample,), LORA, Objective())])
    with pytest.raises(ConfigError, match="train both with the same alpha and rank"):
        layer.reinforce([Reinforce(begun.policy, (sample,), dataclasses.replace(LORA, alpha=3 * LORA.alpha), Objective())])
