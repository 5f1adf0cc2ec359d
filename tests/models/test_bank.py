"""Packed rows and banks of adapters compute what one adapter alone computes on padded rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Lora, Train
from selfimprove.models.bank import Bank, target_modules
from selfimprove.models.layer import Layered
from selfimprove.models.optimizer import BankAdamW
from selfimprove.models.packing import Ragged
from selfimprove.models.rows import Encoded
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.models.train import backward, cache_below, head_gradient, plan

Engines = Callable[..., TorchEngine]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Bare:
    """The `Weights` of an engine without adapters."""

    def layered(self, policy: Any) -> Layered:
        return Layered()


def words(*ids: int) -> str:
    return " ".join(f"w{i % 46}" for i in ids)


def documents(seed: int, count: int, longest: int = 12) -> tuple[Document, ...]:
    """Ragged texts, some with a prompt, one as a chat turn."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        size = int(torch.randint(1, longest, (1,), generator=chance))
        text = words(*torch.randint(0, 46, (size,), generator=chance).tolist())
        prompt = words(*range(seed, seed + i % 3 * 4))
        found.append(Document(text, prompt, chat=i == 2))
    return tuple(found)


def reference(engine: TorchEngine, tiny: Any, lora: Lora) -> Any:
    """The same model with an adapter, by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=engine.dtype)
    layers = list(range(lora.first_layer, model.config.num_hidden_layers))
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), layers_to_transform=layers, lora_dropout=0.0)
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def load(model: Any, adapter: dict[str, Tensor]) -> None:
    outcome = set_peft_model_state_dict(model, adapter)
    assert not outcome.unexpected_keys
    assert not [k for k in outcome.missing_keys if "lora_" in k]


def padded_loss(model: Any, batch: Sequence[Encoded]) -> Tensor:
    """The mean loss over the target tokens of a batch, computed on padded rows by transformers' own model."""
    width = max(len(d.ids) for d in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    seen = torch.zeros(len(batch), width, dtype=torch.long)
    labels = torch.full((len(batch), width), -100)
    for row, d in enumerate(batch):
        ids[row, : len(d.ids)] = torch.tensor(d.ids)
        seen[row, : len(d.ids)] = 1
        labels[row, d.start : len(d.ids)] = torch.tensor(d.ids[d.start :])
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def alone(engine: TorchEngine, model: Any, request: Train) -> tuple[dict[str, Tensor], float]:
    """The adapter that PEFT and torch's AdamW train from the same start, on the same documents in the same order, and its last loss."""
    lora = request.lora
    bank = Bank(engine.frozen.model, lora, 1)
    bank.initialise([request.seed])
    load(model, bank.unload()[0])
    encoded = [Encoded(*engine.frozen.encode_document(d)) for d in request.documents]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=lora.weight_decay)
    steps = plan(len(encoded), lora, request.seed)
    last = len(steps) - len(steps) // lora.epochs
    total, targets = 0.0, 0
    for step, batch in enumerate(steps):
        loss = padded_loss(model, [encoded[i] for i in batch])
        loss.backward()
        if step >= last:
            count = sum(len(encoded[i].ids) - max(1, encoded[i].start) for i in batch)
            total, targets = total + loss.item() * count, targets + count
        if lora.max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, lora.max_norm)
        rise = min(1.0, step / lora.warmup) if lora.warmup else 1.0
        fall = min(1.0, (len(steps) - step) / max(1, len(steps) - lora.warmup)) if lora.schedule == "linear" else 1.0
        optimizer.param_groups[0]["lr"] = lora.learning_rate * min(rise, fall)
        optimizer.step()
        optimizer.zero_grad()
    return {k.replace(".default", ""): p.detach() for k, p in model.named_parameters() if "lora_" in k}, total / targets


def settings(**changes: Any) -> Lora:
    return Lora(**{"rank": 4, "alpha": 8, "targets": ALL, "learning_rate": 5e-3, "epochs": 2, **changes})


def in_a_bank(engine: TorchEngine, requests: Sequence[Train]) -> list[dict[str, Tensor]]:
    return [dict(a) for a, _, _ in engine.train(requests, Bare())[0]]  # type: ignore[arg-type]


# ---- gradients ----


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (1, {}),
        (2, {"targets": ("q_proj", "v_proj")}),
        (7, {}),
        (7, {"targets": ("down_proj",), "rank": 1, "alpha": 3}),
        (3, {"rank": 40}),  # more than a module has inputs
        (2, {"first_layer": 1, "targets": ("k_proj", "o_proj", "up_proj")}),
        (64, {"rank": 2, "targets": ("q_proj", "gate_proj"), "first_layer": 2}),
    ],
    ids=str,
)
def test_gradients_equal_those_of_each_adapter_alone(engines: Engines, tiny: Any, count: int, changes: dict[str, Any]) -> None:
    """Batches of one to three documents of up to 50 tokens."""
    engine = engines()
    lora = settings(**changes)
    engine.frozen.reset()  # another test may have left something merged
    bank = Bank(engine.frozen.model, lora, count)
    bank.initialise(range(count))
    chance = torch.Generator().manual_seed(1)
    for stack in bank.b.values():
        stack.copy_(torch.randn(stack.shape, generator=chance) * 0.1)  # zero B would leave A without a gradient
    BankAdamW(bank.parameters(), [lora] * count, [1] * count)
    batches = [[Encoded(*engine.frozen.encode_document(d)) for d in documents(k, 1 + k % 3, longest=50)] for k in range(count)]
    with bank.attached():
        sums, counts = backward(engine.frozen, bank, list(enumerate(batches)), 2**20, engine.logit_rows)
    model = reference(engine, tiny, lora)
    for (k, batch), adapter in zip(enumerate(batches), bank.unload(), strict=True):
        load(model, adapter)
        model.zero_grad()
        loss = padded_loss(model, batch)
        loss.backward()
        assert float(sums[k]) / counts[k] == pytest.approx(loss.item(), rel=1e-5)
        for name, p in model.named_parameters():
            if "lora_" in name:
                module = name.removeprefix("base_model.model.").split(".lora_")[0]
                ours = (bank.a if ".lora_A." in name else bank.b)[module].grad
                assert ours is not None
                assert p.grad is not None
                assert (ours[k] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-8, name


# ---- weights ----


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norm and attention in float64 throughout: Llama's norm goes through float32, and the fused attention of a text of two
    tokens leaves 1e-11 where its keys' gradient is zero, which AdamW would magnify.
    """

    def forward(norm: Any, x: Tensor) -> Tensor:
        scaled: Tensor = norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return scaled

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1, "alpha": 3, "targets": ("v_proj", "down_proj")},
        {"batch": 3, "schedule": "linear", "warmup": 2},
        {"first_layer": 1, "batch": 2},
        {"first_layer": 2, "targets": ("gate_proj", "o_proj"), "weight_decay": 0.1},
        {"max_norm": 0.0, "targets": ("k_proj",)},
        {"max_norm": 0.05, "schedule": "linear"},
    ],
    ids=lambda c: "-".join(c) or "default",
)
@pytest.mark.usefixtures("exact")
def test_weights_equal_those_of_each_adapter_alone(engines: Engines, tiny: Any, changes: dict[str, Any]) -> None:
    """Adapters with 5, 2 and 7 documents, so that some end early."""
    compare(engines(dtype="float64"), tiny, settings(**changes), (5, 2, 7))


@pytest.mark.parametrize("count", [1, 2, 7, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("exact")
def test_weights_after_fifty_steps(engines: Engines, tiny: Any, count: int) -> None:
    lora = settings(epochs=10, learning_rate=1e-3, rank=2, targets=("q_proj", "v_proj", "down_proj"))
    compare(engines(dtype="float64"), tiny, lora, [5 - k % 3 for k in range(count)])


def compare(engine: TorchEngine, tiny: Any, lora: Lora, sizes: Sequence[int]) -> None:
    """Weights to 1e-8 and losses to 1e-6 of adapters with so many documents, together and each alone."""
    requests = [Train(engine.root, documents(10 + k, n, longest=30), lora, seed=k) for k, n in enumerate(sizes)]
    model = reference(engine, tiny, lora)
    for request, (ours, _, loss) in zip(requests, engine.train(requests, Bare())[0], strict=True):  # type: ignore[arg-type]
        theirs, expected = alone(engine, model, request)
        assert ours.keys() == theirs.keys()
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, weight in theirs.items():
            assert torch.allclose(ours[name], weight, rtol=0, atol=1e-8), name


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("step_tokens", [1, 40, 4096])
def test_an_adapter_does_not_depend_on_its_neighbours(engines: Engines, count: int, step_tokens: int) -> None:
    engine = engines(dtype="float64", step_tokens=step_tokens)
    requests = [Train(engine.root, documents(k, 1 + k % 4), settings(batch=2), seed=k) for k in range(count)]
    together = in_a_bank(engine, requests)
    for request, ours in zip(requests, together, strict=True):
        [theirs] = in_a_bank(engine, [request])
        for name, weight in theirs.items():
            assert torch.allclose(ours[name], weight, rtol=0, atol=1e-9), name


@pytest.mark.parametrize("first_layer", [1, 2])
def test_hidden_states_computed_once_change_nothing(engines: Engines, monkeypatch: pytest.MonkeyPatch, first_layer: int) -> None:
    engine = engines(dtype="float64")
    assert engine.frozen.splits, "the tiny Llama can be run in two pieces"
    requests = [Train(engine.root, documents(k % 2, 3), settings(first_layer=first_layer), seed=k) for k in range(3)]
    once = in_a_bank(engine, requests)
    monkeypatch.setitem(engine.frozen.__dict__, "splits", False)
    again = in_a_bank(engine, requests)
    for one, two in zip(once, again, strict=True):
        assert all(f".layers.{i}." not in name for name in one for i in range(first_layer))
        for name, weight in two.items():
            assert torch.allclose(one[name], weight, rtol=0, atol=1e-9), name


@pytest.mark.parametrize("step_tokens", [1, 30, 1000])
def test_hidden_states_are_kept_once_for_every_text(engines: Engines, step_tokens: int) -> None:
    """However many adapters have it, as a document or with another beginning of the loss."""
    frozen = engines(dtype="float64").frozen
    frozen.reset()
    lengths = [5, 1, 40, 5, 23]
    found = [Encoded([2 + (7 * i + j) % 40 for j in range(n)], start) for start in (0, 1) for i, n in enumerate(lengths)]
    cache_below(frozen, found, 1, step_tokens)
    for one, two in zip(found[: len(lengths)], found[len(lengths) :], strict=True):
        assert one.below is two.below
        with torch.no_grad(), frozen.layers(0, 1):
            assert one.below is not None
            assert torch.allclose(one.below, frozen.packed([one.ids]), atol=1e-12)
    assert len({id(d.below) for d in found}) == len(lengths)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("logit_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_heads_gradient_is_that_of_the_cross_entropy(
    engines: Engines, dtype: str, precision: float, logit_rows: int, sharpness: float, temperature: float
) -> None:
    frozen = engines(dtype=dtype).frozen
    chance = torch.Generator().manual_seed(3)
    hidden = (sharpness * torch.randn(7, frozen.head.shape[1], generator=chance)).to(frozen.dtype).requires_grad_()
    targets = torch.randint(0, len(frozen.head), (7,), generator=chance)
    weight = torch.rand(7, generator=chance, dtype=torch.float64)
    weigh = lambda logprobs: (-logprobs, weight)  # noqa: E731
    losses, grad = head_gradient(hidden.detach(), frozen, targets, weigh, logit_rows, temperature)
    expected = torch.nn.functional.cross_entropy(hidden @ frozen.head.T / temperature, targets, reduction="none")
    (expected * weight).sum().backward()
    assert hidden.grad is not None
    assert (grad - hidden.grad).norm() <= precision * hidden.grad.norm()
    assert torch.allclose(losses, expected.clamp(max=-math.log(1e-30)), rtol=precision, atol=precision), "a loss is at most that of 1e-30"


def test_the_same_tile_gives_the_same_bits(engines: Engines) -> None:
    engine = engines()
    requests = [Train(engine.root, documents(k, 3), settings(), seed=k) for k in range(3)]
    for one, two in zip(in_a_bank(engine, requests), in_a_bank(engine, requests), strict=True):
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_replicates_differ_and_equal_seeds_do_not(engines: Engines) -> None:
    engine = engines()
    three = in_a_bank(engine, [Train(engine.root, documents(0, 2), settings(), seed=s) for s in (0, 1, 0)])
    assert any(not torch.equal(three[0][n], three[1][n]) for n in three[0])
    assert all(torch.allclose(three[0][n], three[2][n], atol=1e-5) for n in three[0])  # slots of one product round differently


# ---- what carries loss, what is charged ----


def test_prompts_carry_no_loss_and_the_text_ends(engines: Engines) -> None:
    engine = engines()
    plain, prompted, chat = (
        Encoded(*engine.frozen.encode_document(d)) for d in (Document("w5 w6"), Document("w5 w6", "w7 w8"), Document("w5 w6", "w7", chat=True))
    )
    eos, w = 1, 2  # w0 is token 2
    assert (plain.ids, plain.start) == ([5 + w, 6 + w, eos], 0)
    assert (prompted.ids, prompted.start) == ([7 + w, 8 + w, 5 + w, 6 + w, eos], 2)
    assert (chat.ids, chat.start) == ([0 + w, 7 + w, 1 + w, 2 + w, 5 + w, 6 + w, eos], 4)
    lora = settings(epochs=1)
    for encoded, targets in ((plain, 2), (prompted, 3), (chat, 3)):  # nothing predicts a text's first token
        bank = Bank(engine.frozen.model, lora, 1)
        BankAdamW(bank.parameters(), [lora], [1])
        with bank.attached():
            assert backward(engine.frozen, bank, [(0, [encoded])], 2**20, engine.logit_rows)[1] == [targets]


@pytest.mark.parametrize("batch", [1, 2, 10])
def test_every_token_of_every_epoch_is_charged_once(engines: Engines, batch: int) -> None:
    engine = engines()
    docs = documents(3, 5)
    results, charges = engine.train([Train(engine.root, docs, settings(epochs=3, batch=batch))], Bare())  # type: ignore[arg-type]
    expected = 3 * sum(len(engine.frozen.encode_document(d)[0]) for d in docs)
    assert results[0][1] == expected == charges["trained_tokens"]
    assert charges["flops"] > 0


def test_no_epochs_leave_the_model_as_it_is(engines: Engines) -> None:
    engine = engines()
    [adapter] = in_a_bank(engine, [Train(engine.root, documents(0, 2), settings(epochs=0))])
    assert all(not w.any() for n, w in adapter.items() if ".lora_B." in n)


def test_a_document_without_anything_to_learn_is_no_error(engines: Engines) -> None:
    """The end-of-text token alone has nothing that predicts it."""
    engine = engines()
    [adapter] = in_a_bank(engine, [Train(engine.root, (Document(""),), settings(epochs=2))])
    assert all(not w.any() for n, w in adapter.items() if ".lora_B." in n)
    both = in_a_bank(engine, [Train(engine.root, (Document(""),), settings(), 0), Train(engine.root, (Document("w1 w2"),), settings(), 1)])
    assert any(w.any() for n, w in both[1].items() if ".lora_B." in n)


def test_training_lowers_the_loss(engines: Engines) -> None:
    engine = engines()
    few, many = (engine.train([Train(engine.root, documents(1, 3), settings(epochs=e))], Bare())[0][0][2] for e in (1, 30))  # type: ignore[arg-type]
    assert many < 0.5 * few


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**63 - 1))
def test_every_epoch_takes_every_document_once(count: int, batch: int, epochs: int, seed: int) -> None:
    steps = plan(count, settings(batch=batch, epochs=epochs), seed)
    flat = [d for step in steps for d in step]
    assert [sorted(flat[e * count : (e + 1) * count]) for e in range(epochs)] == [list(range(count))] * epochs
    assert len(flat) == epochs * count
    assert all(1 <= len(step) <= batch for step in steps)


# ---- layout ----

LENGTHS = st.lists(st.integers(1, 9) | st.sampled_from((17, 26, 60)), min_size=1, max_size=6)
"""Some much longer than others, so that they are not padded together."""


@given(LENGTHS, st.integers(0, 2**32 - 1))
def test_padding_and_back_is_the_identity(lengths: list[int], seed: int) -> None:
    ragged = Ragged(lengths)
    tokens = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(ragged.flat(ragged.pad(tokens)), tokens)
    assert ragged.positions.tolist() == [i for n in lengths for i in range(n)]


@given(LENGTHS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_rows_of_owners_hold_what_they_own(lengths: list[int], count: int, chance: Any) -> None:
    owners = [chance.randrange(count) for _ in lengths]
    ragged = Ragged.by_owner(owners, lengths, count)
    tokens = torch.arange(sum(lengths), dtype=torch.float64)[:, None]
    rows = ragged.pad(tokens)
    pieces = torch.split(tokens, lengths)
    for k in range(count):
        owned = [p for p, owner in zip(pieces, owners, strict=True) if owner == k]
        assert rows[k][ragged.mask[k]].flatten().tolist() == [x for p in owned for x in p.flatten().tolist()]
    assert torch.equal(ragged.flat(rows), tokens)


@given(LENGTHS)
def test_gradients_of_padding_and_back(lengths: list[int]) -> None:
    ragged = Ragged(lengths)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(lengths), 2, generator=chance, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(ragged.rows, ragged.width, 2, generator=chance, dtype=torch.float64)
    (ragged.pad(tokens) * rows * ragged.mask[..., None]).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, rows[ragged.mask])
    source = rows.clone().requires_grad_()
    (ragged.flat(source) * 2).sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad, 2.0 * ragged.mask[..., None].expand_as(rows))


@given(LENGTHS)
def test_packed_rows_equal_padded_rows(engines: Engines, tiny: Any, lengths: list[int]) -> None:
    engine = engines(dtype="float64")
    engine.frozen.reset()
    rows = [[2 + (7 * r + 3 * i) % 46 for i in range(n)] for r, n in enumerate(lengths)]
    with torch.no_grad():
        packed = torch.split(engine.frozen.logits(engine.frozen.packed(rows)), lengths)
        plain = _plain(tiny)
        for row, ours in zip(rows, packed, strict=True):
            assert torch.allclose(plain(torch.tensor([row])).logits[0], ours, atol=1e-9)


_PLAIN: dict[str, Any] = {}


def _plain(tiny: Any) -> Any:
    """Transformers' own model, opened once."""
    key = str(tiny)
    if key not in _PLAIN:
        _PLAIN[key] = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    return _PLAIN[key]


# ---- what an adapter sits on ----


def test_targets_are_found_from_the_first_layer_up(engines: Engines) -> None:
    found = target_modules(engines().frozen.model, settings(targets=("q_proj", "up_proj"), first_layer=2))
    assert list(found) == ["model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("q_proj", "wq")}, r"no linear module \['wq'\].*it has .*q_proj"),
        ({"targets": ("q_proj", "lm_head")}, r"no linear module \['lm_head'\]"),  # which passes do not call
        ({"first_layer": 3}, "in layer 3 or above"),
    ],
)
def test_a_target_that_the_model_lacks_is_named(engines: Engines, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        target_modules(engines().frozen.model, settings(**changes))


@pytest.mark.parametrize("changes", [{"rank": 0}, {"epochs": -1}, {"batch": 0}, {"targets": ()}, {"schedule": "cosine"}])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Lora"):
        settings(**changes)


def test_slots_are_loaded_and_read_back(engines: Engines) -> None:
    one, two = (Bank(engines().frozen.model, settings(), n) for n in (3, 1))
    one.initialise([4, 5, 6])
    two.put(0, one.unload()[1])
    assert all(torch.equal(one.unload()[1][n], w) for n, w in two.unload()[0].items())
    two.initialise([5])
    assert all(torch.equal(one.unload()[1][n], w) for n, w in two.unload()[0].items()), "an initial adapter does not depend on its slot"


def test_an_attached_bank_leaves_no_hook_behind(engines: Engines) -> None:
    engine = engines()
    bank = Bank(engine.frozen.model, settings(), 1)
    with pytest.raises(KeyError), bank.attached():
        raise KeyError
    assert not any(m._forward_hooks for m in engine.frozen.model.modules())
