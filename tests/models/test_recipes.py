"""Derived policies: noise is what its seed says, a step is the paper's formula, and neither depends on how the work was cut."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from selfimprove.errors import ConfigError, StorageError
from selfimprove.ledger import Ledger
from selfimprove.models import Ascent, Document, Evolve, Generate, Lora, Mix, Models, Perturb, Score, Train, optimizer_of
from selfimprove.models.adapters import write_adapter
from selfimprove.models.noise import Table
from selfimprove.models.recipes import decode, encode
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

Build = Callable[..., Models]
TARGETS = ("q_proj", "v_proj", "down_proj")
PROMPTS = ("w1 w2 w3", "w5", "w7 w8 w9 w10 w11")


def population(layer: Models, policy: Part, pairs: int = 3, **options: Any) -> list[Part]:
    changes: dict[str, Any] = {"sigma": 0.05, "rank": 1, "targets": TARGETS, **options}
    return layer.derive([Perturb(policy, 100 + i, sign=sign, **changes) for i in range(pairs) for sign in (1, -1)])


def likelihoods(layer: Models, policies: Sequence[Part]) -> list[float]:
    return [x.logprob for x in layer.score([Score(p, prompt, "w4 w6") for p in policies for prompt in PROMPTS])]


def fitness(layer: Models, policies: Sequence[Part]) -> list[list[Any]]:
    """Whatever a fitness may be made of, by policy: likelihoods, and sampled answers with their log-probabilities."""
    scored = likelihoods(layer, policies)
    answers = layer.generate([Generate(p, prompt, 5, seed=i, logprobs=True) for p in policies for i, prompt in enumerate(PROMPTS)])
    told = [[x, c.text, list(c.logprobs)] for x, c in zip(scored, answers, strict=True)]
    return [told[at : at + len(PROMPTS)] for at in range(0, len(told), len(PROMPTS))]


def weights_of(layer: Models, policy: Part) -> dict[str, Tensor]:
    with layer.open(policy) as model:
        return {n: w.detach().clone() for n, w in model.state_dict().items()}


def dense(layer: Models, member: Part) -> dict[str, Tensor]:
    """Sign · E of a member, module by module."""
    recipe = layer.recipe(member)
    assert isinstance(recipe, Perturb)
    content, found = layer.adapter(member.digest), {}
    if not recipe.rank:
        return {n: w / recipe.sigma for n, w in content.items()}
    for name, a in content.items():
        if ".lora_A." in name:
            b = content[name.replace("lora_A", "lora_B")]
            found[name.removeprefix("base_model.model.").replace("lora_A.", "")] = b @ a / math.sqrt(recipe.rank)
    return found


# ---- noise ----


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_noise_is_an_adapter_that_peft_runs(build: Build, peer: Any, rank: int) -> None:
    layer = build()
    members = population(layer, layer.root, 1, rank=rank)
    expected = [peer(layer, m).logprob(prompt, "w4 w6") for m in members for prompt in PROMPTS]
    assert likelihoods(layer, members) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_noise_of_a_member_is_what_opening_it_adds(build: Build, rank: int) -> None:
    layer = build(dtype="float64")
    [member, opposite] = population(layer, layer.root, 1, rank=rank)
    base, up, down = (weights_of(layer, p) for p in (layer.root, member, opposite))
    for name, noise in dense(layer, member).items():
        assert torch.allclose(up[name] - base[name], 0.05 * noise.double(), atol=1e-9)
        assert torch.allclose(down[name] - base[name], -0.05 * noise.double(), atol=1e-9)
        assert 0.5 < float(noise.pow(2).mean()) < 2.0 or rank
    unmoved = [n for n in base if n not in dense(layer, member)]
    assert all(torch.equal(base[n], up[n]) for n in unmoved)


def test_noise_of_full_rank_leaves_the_weights_alone_and_answers_as_the_opened_policy_does(build: Build) -> None:
    layer = build()
    engine: Any = layer.engine
    before = weights_of(layer, layer.root)
    writes = {n: w._version for n, w in engine.frozen.model.named_parameters()}
    [member, _] = population(layer, layer.root, 1, rank=0)
    found = likelihoods(layer, [member])
    texts = [c.text for c in layer.generate([Generate(member, p, 6, temperature=0) for p in PROMPTS])]
    after = {n: w.detach().clone() for n, w in engine.frozen.model.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert writes == {n: w._version for n, w in engine.frozen.model.named_parameters()}, "not even written and put back"
    with layer.open(member) as model:
        for prompt, logprob, text in zip(PROMPTS, found, texts, strict=True):
            start, end = engine.frozen.encode(prompt), engine.frozen.encode("w4 w6")
            logs = model(torch.tensor([start + end])).logits[0, :-1].log_softmax(-1)
            assert logprob == pytest.approx(float(logs.gather(1, torch.tensor([[t] for t in (start + end)[1:]]))[len(start) - 1 :].sum()), abs=1e-4)
            out = model.generate(torch.tensor([start]), max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, len(start)))
            assert engine.tokenizer.decode(out[0, len(start) :]).removesuffix(" <eos>") == text


@given(st.integers(0, 2**63 - 1), st.sampled_from([0, 1, 4]), st.sampled_from([1, -1]), st.floats(1e-6, 10))
def test_recipes_survive_the_disk(seed: int, rank: int, sign: int, sigma: float) -> None:
    root, member = Part("model", "r"), Part("adapter", "m")
    for recipe in (
        Perturb(root, seed, sigma, sign, rank, TARGETS),
        Evolve(root, (member, member), (sigma, -1.0), Ascent(0.1, "adam"), Part("optimizer", "o")),
        Evolve(root, (member,), (sigma,), Ascent(sigma, momentum=0.5)),
        Mix(root, (member, member), ((sigma, 1.0), (0.0, 2.0))),
    ):
        assert decode(json.loads(json.dumps(encode(recipe)))) == recipe


# ---- a step ----


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_step_is_the_weighted_sum_of_the_noise(build: Build, rank: int) -> None:
    layer = build(dtype="float64")
    members = population(layer, layer.root, rank=rank)
    weights = (0.5, -0.25, 0.125, 0.0, -1.0, 0.75)
    [child] = layer.derive([Evolve(layer.root, tuple(members), weights, Ascent(0.1))])
    base, moved = weights_of(layer, layer.root), weights_of(layer, child)
    for name in dense(layer, members[0]):
        expected = sum(w * dense(layer, m)[name] for w, m in zip(weights, members, strict=True))
        assert torch.allclose(moved[name] - base[name], 0.1 * torch.as_tensor(expected).double(), atol=1e-6)


@pytest.mark.parametrize("ascent", [Ascent(0.1, momentum=0.9), Ascent(0.01, "adam")])
def test_moments_go_on_from_step_to_step(build: Build, ascent: Ascent) -> None:
    """Two steps are what torch's optimizer makes of the two estimates."""
    layer = build(dtype="float64")
    policy, moments, estimates = layer.root, None, []
    for number in range(2):
        members = layer.derive([Perturb(policy, 10 * number + i, 0.05, rank=1, targets=TARGETS) for i in range(2)])
        estimates.append(
            [torch.as_tensor(sum(w * dense(layer, m)[n] for w, m in zip((1.0, 0.5), members, strict=True))) for n in dense(layer, members[0])]
        )
        [policy] = layer.derive([Evolve(policy, tuple(members), (1.0, 0.5), ascent, moments)])
        moments = optimizer_of(policy)
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in estimates[0]]
    rule: Any = (
        torch.optim.Adam(parameters, lr=0.01, maximize=True) if ascent.optimizer == "adam" else torch.optim.SGD(parameters, 0.1, 0.9, maximize=True)
    )
    for gradients in estimates:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        rule.step()
    for found, expected in zip(layer.adapter(policy.digest).values(), parameters, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_equal_fitness_makes_equal_bits_in_any_order_and_however_the_population_was_cut(build: Build) -> None:
    one, other = build("one", bank=2), build("other", bank=64)
    children = []
    for layer, order in ((one, [0, 1, 2, 3, 4, 5]), (other, [3, 5, 1, 0, 2, 4])):
        members = population(layer, layer.root)
        likelihoods(layer, members)
        weights = (0.3, -0.1, 0.7, 0.2, -0.6, 1 / 3)
        chosen = tuple(members[i] for i in order), tuple(weights[i] for i in order)
        children += [layer.derive([Evolve(layer.root, *chosen, Ascent(0.1, momentum=0.9))])[0]]
    first, second = one.adapter(children[0].digest), other.adapter(children[1].digest)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_fitness_is_equal_in_one_batch_in_several_and_over_processes(build: Build, tiny: Path, tmp_path: Path) -> None:
    """In float32, with tiles of two members, of low and of full rank: likelihoods, and sampled answers with their log-probabilities."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tiny), str(tmp_path / f"worker{at}"), str(at), str(torch.get_num_threads())], stdout=subprocess.PIPE
        )
        for at in (0, 2)
    ]
    told = [json.loads(worker.communicate()[0]) for worker in workers]
    layer, several = build("one", bank=2), build("several", bank=2)
    for rank in (0, 1):
        at_once = fitness(layer, population(layer, layer.root, rank=rank))
        members = population(several, several.root, rank=rank)
        in_batches = [fitness(several, members[at : at + 2]) for at in (4, 2, 0)]
        assert [x for batch in reversed(in_batches) for x in batch] == at_once
        assert [x for shares in told for x in shares[rank]] == at_once


def test_tiles_hold_whole_policies(build: Build) -> None:
    """Of at most 4·rows requests and `bank` adapters; only a policy with more requests than that is cut."""
    layer = build(rows=2, bank=3)
    members = population(layer, layer.root)
    few = [Score(p, prompt, "w4") for p in members for prompt in PROMPTS]
    assert [len({few[i].policy for i in tile}) for tile in layer.engine.tiles(few, layer)] == [2, 2, 2]
    single = [Score(p, "w1", "w4") for p in members]
    assert [len(tile) for tile in layer.engine.tiles(single, layer)] == [3, 3]
    many = [Score(members[0], f"w{i}", "w4") for i in range(20)]
    assert [len(tile) for tile in layer.engine.tiles(many, layer)] == [8, 8, 4]
    assert sorted(i for tile in layer.engine.tiles([*few, *many], layer) for i in tile) == list(range(38))


def test_a_step_is_derived_again_after_it_was_pruned_and_after_a_restart(build: Build) -> None:
    layer = build()
    policy, moments, chain = layer.root, None, []
    for _ in range(4):
        members = population(layer, policy)
        [policy] = layer.derive([Evolve(policy, tuple(members), (0.3, -0.1, 0.7, 0.2, -0.6, 0.1), Ascent(0.1, momentum=0.9), moments)])
        moments = optimizer_of(policy)
        chain.append(policy)
    contents = [dict(layer.adapter(p.digest)) for p in chain]
    layer.retain([chain[-1]])  # it is in memory, so this writes it
    assert len(list(layer.folder.glob("tiles/*/*.safetensors"))) == 1
    again = Models(layer.engine, layer.folder, Ledger())
    for policy, content in reversed(list(zip(chain, contents, strict=True))):
        found = again.adapter(policy.digest)
        assert all(torch.equal(found[n], content[n]) for n in content)
    again.retain([])
    assert not list(layer.folder.glob("tiles/*/*.safetensors"))
    assert all(torch.equal(w, contents[-1][n]) for n, w in again.adapter(chain[-1].digest).items())


def test_a_chain_may_be_longer_than_the_stack(build: Build) -> None:
    layer = build()
    policy = layer.root
    for i in range(200):
        [member] = layer.derive([Perturb(policy, i, 0.01, rank=1, targets=("q_proj",))])
        [policy] = layer.derive([Evolve(policy, (member,), (1.0,), Ascent(0.01))])
    again = Models(layer.engine, layer.folder, Ledger())
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert len(again.layered(policy).merged) == 1
        assert again.adapter(policy.digest)
    finally:
        sys.setrecursionlimit(limit)


def test_what_was_merged_before_an_evolution_stays_below_it(build: Build) -> None:
    layer = build(dtype="float64")
    [trained] = layer.train([Train(layer.root, (Document("w1 w2"),), Lora(2, 4, ("q_proj",), 0.05, 2, merge=True))])
    members = population(layer, trained.policy, rank=0)
    [child] = layer.derive([Evolve(trained.policy, tuple(members), (1.0,) * 5 + (0.5,), Ascent(0.1))])
    below, above = weights_of(layer, trained.policy), weights_of(layer, child)
    added = layer.adapter(child.digest)
    assert all(torch.allclose(above[n] - below[n], added[n].double(), atol=1e-9) if n in added else torch.equal(above[n], below[n]) for n in above)


def test_a_step_is_charged_whether_or_not_it_was_computed(build: Build) -> None:
    layer = build()
    members = population(layer, layer.root)
    assert layer.ledger.totals["flops"] == 0
    layer.derive([Evolve(layer.root, tuple(members), (1.0,) * 6, Ascent(0.1))])
    assert layer.ledger.totals["flops"] > 0


def test_noise_is_the_same_in_a_shorter_type() -> None:
    table, weight = Table(64, torch.device("cpu")), torch.zeros(8, 8)
    long, short = (table.window(1, "m", weight, dtype) for dtype in (torch.float64, torch.bfloat16))
    assert long.dtype == torch.float32
    assert torch.equal(long.bfloat16(), short)


def test_noise_in_bfloat16(build: Build) -> None:
    layer = build(dtype="bfloat16")
    for rank in (0, 1):
        members = population(layer, layer.root, rank=rank)
        assert all(math.isfinite(x) for x in likelihoods(layer, members))
        [child] = layer.derive([Evolve(layer.root, tuple(members), (1.0,) * 5 + (0.0,), Ascent(0.1))])
        assert likelihoods(layer, [child]) != likelihoods(layer, [layer.root])


# ---- mixtures ----


def test_a_mixture_is_the_weighted_sum_of_adapters(build: Build) -> None:
    layer = build(dtype="float64")
    trained = layer.train(
        [Train(layer.root, (Document(t),), Lora(r, 4, ("q_proj", "up_proj"), 0.05, 2), seed=r) for t, r in (("w1 w2", 2), ("w9", 1))]
    )
    policies = tuple(t.policy for t in trained)
    table = ((1.0, 0.5, -1.0), (0.25, 0.0, 2.0))
    [mixed] = layer.derive([Mix(layer.root, policies, table)])
    base, found = weights_of(layer, layer.root), weights_of(layer, mixed)
    parts = [weights_of(layer, p) for p in policies]
    for name in (n for n in base if "q_proj" in n or "up_proj" in n):
        n = int(name.split(".")[2])
        expected = sum((row[n] * (own[name] - base[name]) for row, own in zip(table, parts, strict=True)), torch.zeros_like(base[name]))
        assert torch.allclose(found[name] - base[name], expected, atol=1e-6)


def test_an_adapter_in_a_folder_is_adopted(build: Build, tmp_path: Path) -> None:
    layer = build()
    lora = Lora(2, 4, ("q_proj",), 0.05, 2)
    [trained] = layer.train([Train(layer.root, (Document("w1 w2"),), lora)])
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, layer.adapter(trained.policy.digest), lora, "base")
    [adopted] = layer.adopt([folder])
    assert likelihoods(layer, [adopted]) == pytest.approx(likelihoods(layer, [trained.policy]))
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text().replace("LORA", "VERA"))
    with pytest.raises(ConfigError, match="no LoRA of one rank"):
        layer.adopt([folder])
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        Models(layer.engine, layer.folder, Ledger()).adapter(adopted.digest)
    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        layer.adopt([tmp_path])


# ---- refusals ----


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": float("nan")}, {"sign": 0}, {"rank": -1}, {"targets": ()}])
def test_noise_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="noise wants"):
        Perturb(**{"policy": Part("model", ""), "seed": 1, "sigma": 0.1, **wrong})


def test_what_cannot_be_derived_is_refused(build: Build) -> None:
    layer = build()
    one, other = population(layer, layer.root, 1)[0], population(layer, layer.root, 1, rank=2)[0]
    with pytest.raises(ConfigError, match="live adapter"):
        population(layer, one)
    with pytest.raises(StorageError, match="was not made"):
        population(layer, Part("model", "somebody's"))
    [child] = layer.derive([Evolve(layer.root, (one, other), (1.0, 1.0), Ascent(0.1))])
    with pytest.raises(ConfigError, match="noise of one kind"):
        layer.adapter(child.digest)
    [child] = layer.derive([Evolve(layer.root, (layer.root,), (1.0,), Ascent(0.1))])
    with pytest.raises(ConfigError, match="is none"):
        layer.adapter(child.digest)
    with pytest.raises(ConfigError, match="a mixture is of adapters"):
        layer.score([Score(layer.derive([Mix(layer.root, (layer.root,), ((1.0,),))])[0], "w1", "w2")])
    for wrong in ({"optimizer": "lion"}, {"learning_rate": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ConfigError, match="ascent"):
            Ascent(**{"learning_rate": 0.1, **wrong})  # type: ignore[arg-type]


def _worker(model: str, folder: str, at: int, threads: int) -> None:
    """The fitness of this process's share of the population by rank, as JSON."""
    Path(folder).mkdir()
    layer = Models(TorchEngine(model, dtype="float32", bank=2, threads=threads), Path(folder), Ledger())
    populations = [population(layer, layer.root, rank=rank) for rank in (0, 1)]
    print(json.dumps([fitness(layer, p[:2] if at == 0 else p[2:]) for p in populations]))


if __name__ == "__main__":
    _worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
