"""What an engine opens is what it computes, whatever was merged before; how it cuts its work; what it remembers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from selfimprove.errors import ConfigError, UserError
from selfimprove.models import Document, Generate, Lora, Models, Objective, Reinforce, Sample, Score, Train
from selfimprove.models.bank import target_modules
from selfimprove.models.frozen import Frozen
from selfimprove.models.packing import ATTENTION, KEYS, _similar
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

Build = Callable[..., Models]
Engines = Callable[..., TorchEngine]
PROMPTS = ("w3 w4 w5", "w9", "w3 w4 w7 w8 w9 w10 w11", "", "w3 w4 w5", "w30 w31 w32 w33")
LORA = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), learning_rate=0.05, epochs=3)
MERGED = Lora(rank=2, alpha=8, targets=("q_proj", "o_proj", "up_proj"), learning_rate=0.05, epochs=3, merge=True)


def taught(layer: Models, text: str, on: Part | None = None, lora: Lora = LORA, seed: int = 0) -> Part:
    return layer.train([Train(on or layer.root, (Document(text),), lora, seed)])[0].policy


def greedy(policy: Part, prompt: str, tokens: int = 8, **options: Any) -> Generate:
    return Generate(policy, prompt, tokens, temperature=0.0, **options)


def plain(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)


def texts(layer: Models, requests: list[Generate]) -> list[str]:
    return [c.text for c in layer.generate(requests)]


@pytest.mark.parametrize("text", ["a\ud800b", "\x00\x1b[31m", "\u202e", "é" * 300, "\n\n", " ", "\U0001f600 w3"])
def test_hostile_texts(build: Build, text: str) -> None:
    layer = build()
    assert math.isfinite(layer.score([Score(layer.root, text, text)])[0].logprob)
    [trained] = layer.train([Train(layer.root, (Document(text), Document(text, prompt=text), Document(text, prompt=text, chat=True)), LORA)])
    assert layer.generate([Generate(trained.policy, text, 3, stop=(text,)), Generate(trained.policy, text, 3, chat=True)])


# ---- how work is cut ----


def test_adapters_with_rates_and_epochs_of_their_own_train_in_one_bank_as_they_would_alone(build: Build) -> None:
    layer = build(dtype="float64")
    loras = [LORA, replace(LORA, learning_rate=0.01), replace(LORA, epochs=7), replace(LORA, batch=1, schedule="linear"), LORA]
    requests = [
        Train(layer.root, (Document("w1 w2 w3"), Document(f"w{i} w5 w6"), Document("w7 w8 w9 w10")), lora, seed=i) for i, lora in enumerate(loras)
    ]
    assert len(layer.engine.tiles(requests, layer)) == 1
    together = layer.train(requests)
    for i, (request, one) in enumerate(zip(requests, together, strict=True)):
        apart = build(f"apart{i}", dtype="float64")
        [alone] = apart.train([request])
        assert (one.tokens, one.loss) == (alone.tokens, pytest.approx(alone.loss, rel=1e-6))
        theirs = apart.adapter(alone.policy.digest)
        assert all(torch.allclose(w, theirs[n], atol=1e-6) for n, w in layer.adapter(one.policy.digest).items())


def test_a_batch_larger_than_a_pass_is_computed_in_several(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    forward = Frozen.forward

    def counted(self: Frozen, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        passes.append(ids.numel())
        return forward(self, ids, *args, **options)

    documents = tuple(Document(" ".join(f"w{(i * j) % 46}" for j in range(20 + i))) for i in range(12))
    samples = tuple(Sample("w3 w4", d.text, tuple(range(2, 12)), (-1.0,) * 10, (0.5,) * 10, (0.1,) * 10) for d in documents)
    found = []
    for name, limit in (("whole", 2048), ("pieces", 64)):
        layer = build(name, dtype="float64")
        layer.engine.split = replace(layer.engine.split, step_tokens=limit)
        monkeypatch.setattr(Frozen, "forward", counted)
        passes.clear()
        [trained] = layer.train([Train(layer.root, documents, replace(LORA, batch=64))])
        [reinforced] = layer.reinforce([Reinforce(layer.root, samples, replace(LORA, batch=64), Objective())])
        monkeypatch.undo()
        found.append((max(passes), trained, reinforced, layer.adapter(trained.policy.digest), layer.adapter(reinforced.policy.digest)))
    (_, trained, reinforced, *adapters), (most, its_trained, its_reinforced, *its_adapters) = found
    assert most <= 64
    assert its_trained.tokens == trained.tokens
    assert its_trained.loss == pytest.approx(trained.loss, rel=1e-6)
    assert its_reinforced.tokens == reinforced.tokens
    for one, other in zip(adapters, its_adapters, strict=True):
        assert all(torch.allclose(w, other[n], atol=1e-6) for n, w in one.items())


def test_adapters_that_serve_fit_the_memory_too(build: Build) -> None:
    layer = build()
    policies = [t.policy for t in layer.train([Train(layer.root, (Document(f"w{i} w2"),), LORA, seed=i) for i in range(6)])]
    layer.engine.split = replace(layer.engine.split, bank_weights=1)
    for requests in ([greedy(p, "w1") for p in policies], [Score(p, "w1", "w2") for p in policies]):
        assert [len(t) for t in layer.engine.tiles(requests, layer)] == [1] * 6


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60).map(sorted), st.integers(0, 100_000))
def test_rows_are_padded_together_as_long_as_their_keys_fit(lengths: list[int], prefix: int) -> None:
    runs = _similar(lengths, prefix)
    assert [i for begin, end in runs for i in range(begin, end)] == list(range(len(lengths)))
    for begin, end in runs:
        assert end == begin + 1 or (end - begin) * (prefix + lengths[end - 1]) <= KEYS


# ---- merged and live adapters ----


def test_weights_that_a_borrower_changed_are_told_and_not_computed_with(build: Build) -> None:
    layer = build()
    before = layer.score([Score(layer.root, "w1", "w2 w3")])[0].logprob
    with pytest.raises(ConfigError, match=r"given back with other weights \(model.layers.0"), layer.open(layer.root) as model, torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)
    with torch.no_grad():  # other tests share the engine
        layer.engine.frozen.model.model.layers[0].input_layernorm.weight.div_(2)
    again = build("again")
    assert again.score([Score(again.root, "w1", "w2 w3")])[0].logprob == pytest.approx(before)


def bits(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in engine.frozen.model.named_parameters()}


def test_unmerging_leaves_the_weights_as_they_were(build: Build, tiny: Path) -> None:
    layer = build()
    layer.generate([greedy(layer.root, "w1")])
    before = bits(layer.engine)
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    upper = taught(layer, "w5 w6", on=lower, lora=MERGED)
    live = taught(layer, "w7 w8", on=upper)
    for policy in (upper, live, lower, layer.root, upper):
        layer.score([Score(policy, "w1", f"w2 w{policy.digest[:1]}")])
    with layer.open(live) as model:
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    layer.score([Score(layer.root, "w1", "w2 w3")])
    after = bits(layer.engine)
    assert all(torch.equal(before[n], after[n]) for n in before)
    original = plain(tiny).state_dict()
    assert all(torch.equal(original[n], after[n]) for n in after)


def test_what_is_merged_does_not_depend_on_what_was_merged_before(build: Build) -> None:
    layer = build()
    one, two = (taught(layer, t, lora=MERGED) for t in ("w1 w2", "w8 w9"))
    both = taught(layer, "w5 w6", on=one, lora=MERGED)
    with layer.open(both):
        direct = bits(layer.engine)
    for detour in (two, layer.root, one, both, two):
        with layer.open(detour):
            pass
    with layer.open(both):
        assert all(torch.equal(direct[n], w) for n, w in bits(layer.engine).items())


def test_a_long_chain_of_merged_adapters_is_merged_link_by_link(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of a long run merges what the last one made, not all that every round before made; from the end, the chain is the same."""
    layer = build()
    added: list[str] = []
    add = Frozen.add
    monkeypatch.setattr(Frozen, "add", lambda frozen, name, *rest: (added.append(name), add(frozen, name, *rest)))
    chain = [layer.root]
    for i in range(12):
        chain.append(taught(layer, f"w{i} w{i + 1}", on=chain[-1], lora=MERGED))
        layer.score([Score(chain[-1], "w1", "w2")])
    assert added == [p.digest for p in chain[1:]]
    grown = bits(layer.engine)
    layer.score([Score(layer.root, "w1", "w3")])
    layer.score([Score(chain[-1], "w1", "w4")])
    assert added == [p.digest for p in chain[1:]] * 2
    assert all(torch.equal(grown[n], w) for n, w in bits(layer.engine).items())


@pytest.mark.parametrize("reopen", [False, True])
def test_a_pruned_chain_is_merged_as_it_was(build: Build, reopen: bool) -> None:
    """Its adapters are trained again, each on those below, while the weights hold another chain; a shorter one after it is right too."""
    layer, whole = build(), build("whole")
    chains = []
    for one in (layer, whole):
        chain = [one.root]
        for i in range(4):
            chain.append(taught(one, f"w{i} w{i + 1}", on=chain[-1], lora=MERGED))
        chains.append(chain)
    assert chains[0] == chains[1]
    other = taught(layer, "w30 w31", lora=MERGED)
    layer.retain([other])
    if reopen:
        layer = build()
    for policy in (chains[0][4], chains[0][2], other, chains[0][3]):
        if policy != other:
            found, expected = (one.score([Score(policy, "w1", "w2 w3 w4")]) for one in (layer, whole))
            assert found == expected
        layer.score([Score(other, "w1", f"w{policy.digest[:1]}")])


@pytest.mark.parametrize("step", ["add", "reset"])
def test_an_interrupted_merge_is_done_anew(build: Build, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    layer = build()
    one, two = (taught(layer, t, lora=MERGED) for t in ("w1 w2 w3", "w7 w8"))
    requests = [Score(p, "w1", "w2 w3") for p in (layer.root, one, two)]
    expected = [build("whole").score([r])[0] for r in requests[:1]]
    layer.score([Score(one, "w4", "w5")])
    frozen = layer.engine.frozen

    def interrupted(found: Iterator[Any]) -> Iterator[Any]:
        yield next(found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "add":
            added = Frozen._added
            patch.setattr(Frozen, "_added", lambda *a: interrupted(added(*a)))
        else:
            originals = frozen._originals
            patch.setattr(frozen, "_originals", type("Originals", (dict,), {"items": lambda d: interrupted(iter(originals.items()))})(originals))
        with pytest.raises(KeyboardInterrupt):
            layer.score([Score(two, "w4", "w5")])
    found = [layer.score([r])[0] for r in requests]
    assert found[:1] == expected
    again = build("again")
    assert [taught(again, t, lora=MERGED) for t in ("w1 w2 w3", "w7 w8")] == [one, two]
    assert [again.score([r])[0] for r in requests] == found


def test_an_open_policy_says_what_its_adapters_say(build: Build, peer: Callable[[Models, Part], Any]) -> None:
    """On a batch padded on the left too, as `model.generate` wants it."""
    layer = build()
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    rows = [layer.engine.frozen.encode_prompt(p, False) for p in PROMPTS]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    for policy in (layer.root, lower, taught(layer, "w3 w4 w5 w40 w41", on=lower), taught(layer, "w20 w21")):
        alone = peer(layer, policy)
        said = [alone.text(p, 8) for p in PROMPTS]
        assert texts(layer, [greedy(policy, p) for p in PROMPTS]) == said
        with layer.open(policy) as model, torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
            for i, row in enumerate(rows):
                assert torch.allclose(logits[i, -len(row) :], alone.model(torch.tensor([row])).logits[0], atol=1e-4)
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, width:].tolist()
        assert [layer.engine.tokenizer.decode(row[: row.index(1)] if 1 in row else row) for row in out] == said


def test_the_engines_attention_is_back_after_an_open_policy(build: Build) -> None:
    layer = build()
    model = layer.engine.frozen.model
    for wrong in (KeyError, KeyboardInterrupt):
        with pytest.raises(wrong), layer.open(layer.root):
            raise wrong
        assert model.config._attn_implementation == ATTENTION
    assert layer.score([Score(layer.root, "w3 w4", "w5 w6 w7")])[0].logprob < 0


def test_nothing_else_is_computed_while_a_policy_is_open(build: Build) -> None:
    """It would change the weights of the open one, or be computed with its attention; what is remembered needs no computing."""
    layer = build()
    live = taught(layer, "w1 w2 w3")
    known = layer.score([Score(live, "w1", "w2")])
    calls: list[Callable[[], Any]] = [
        lambda: layer.score([Score(layer.root, "w1", "w2")]),
        lambda: layer.generate([greedy(live, "w1")]),
        lambda: taught(layer, "w5"),
        lambda: layer.open(layer.root).__enter__(),
    ]
    with layer.open(live) as model:
        before = bits(layer.engine)
        for call in calls:
            with pytest.raises(ConfigError, match="a policy is open"):
                call()
        assert layer.score([Score(live, "w1", "w2")]) == known
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for call in calls:
        call()


def test_an_adapter_on_a_merged_policy_stands_on_it(build: Build) -> None:
    layer = build()
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    untrained = taught(layer, "w9", on=lower, lora=replace(LORA, epochs=0))
    one, two = layer.score([Score(p, "w1", "w2 w3") for p in (lower, untrained)])
    assert one.logprob == pytest.approx(two.logprob, abs=1e-6)
    assert one.logprob > layer.score([Score(layer.root, "w1", "w2 w3")])[0].logprob


def test_a_live_adapter_is_no_ground_to_train_on(build: Build) -> None:
    """Also beside others whose ground is right."""
    layer = build()
    live = taught(layer, "w1 w2")
    for grounds in ([live], [layer.root, live]):
        with pytest.raises(ConfigError, match="merge=true"):
            layer.train([Train(p, (Document("w3 w4"),), LORA, seed=i) for i, p in enumerate(grounds)])


def test_policies_over_different_weights_in_one_call(build: Build) -> None:
    """Tiles keep merged weights and shapes apart; results come back in the order of the requests."""
    layer = build(rows=3)
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    other = Lora(rank=2, alpha=2, targets=("k_proj",), learning_rate=0.1, epochs=3)
    policies = [layer.root, lower, taught(layer, "w8 w9"), taught(layer, "w8 w9", on=lower), taught(layer, "w3 w9", lora=other)]
    requests = [greedy(p, q) for q in PROMPTS for p in policies]
    together = texts(layer, requests)
    assert together == [texts(layer, [r])[0] for r in requests]
    scores = layer.score([Score(p, q, "w5 w6") for q in PROMPTS for p in policies])
    singly = [layer.score([Score(p, q, "w5 w6")])[0] for q in PROMPTS for p in policies]
    assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in singly], abs=1e-5)


# ---- the split ----


def tiles(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("tiles/*/*")}


def test_the_split_is_recorded_and_used_again(build: Build, tmp_path: Path) -> None:
    """By an engine that would have found another one, which then has nothing left to compute."""
    first = build(step_tokens=40)
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == asdict(first.engine.split)
    done, made = work(first), tiles(tmp_path / "run")
    again = build(step_tokens=4096)
    assert again.engine.split.step_tokens == 40
    assert work(again) == done
    assert tiles(tmp_path / "run") == made
    assert build("other", step_tokens=4096).engine.split.step_tokens == 4096


def test_equal_splits_make_equal_tiles_and_others_do_not(build: Build, tmp_path: Path) -> None:
    for name, options in {"one": {"step_tokens": 40}, "two": {"step_tokens": 4096}}.items():
        work(build(name, **options))
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "split.json").write_bytes((tmp_path / "one" / "split.json").read_bytes())
    work(build("three", step_tokens=4096))
    one, two, three = (tiles(tmp_path / n) for n in ("one", "two", "three"))
    assert one == three
    assert not one & two


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"split\.json cannot be read .*delete that file"),
        ('{"step_tokens": 40', r"split\.json cannot be read .*delete that file"),
        ("null", r"split\.json cannot be read .*delete that file"),
        ("[]", "split.json wants whole numbers for step_tokens, .*start a new run"),
        ('{"rows": 3}', r"split.json wants .*; got \{'rows': 3\}; start a new run"),
        ('{"step_tokens": 0, "bank_weights": 1, "cache_tokens": 1}', "got .*'step_tokens': 0"),
        ('{"step_tokens": 1.5, "bank_weights": 1, "cache_tokens": 1}', "got .*1.5"),
        ('{"step_tokens": "40", "bank_weights": 1, "cache_tokens": 1}', "got .*'40'"),
        ('{"step_tokens": true, "bank_weights": 1, "cache_tokens": 1}', "got .*True"),
        ('{"step_tokens": 1, "bank_weights": 1, "cache_tokens": 1, "more": 1}', "got .*'more'"),
    ],
)
def test_a_broken_or_foreign_split(build: Build, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "split.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build()


@pytest.mark.parametrize(("adapters", "widths"), [(1, [1] * 5), (2, [2, 2, 1]), (2.9, [2, 2, 1]), (64, [5])])
def test_the_memory_for_adapters_bounds_how_many_train_together(
    build: Build, monkeypatch: pytest.MonkeyPatch, adapters: float, widths: list[int]
) -> None:
    """And whatever their number, each becomes what it becomes alone."""
    layer = build(dtype="float64")
    engine = layer.engine
    weights = sum(LORA.rank * (m.in_features + m.out_features) for m in target_modules(engine.frozen.model, LORA).values())
    monkeypatch.setattr(engine, "split", replace(engine.split, bank_weights=int(adapters * weights)))
    requests = [Train(layer.root, tuple(Document(f"w{i} w{j} w{i + j}") for j in range(1 + i)), LORA, seed=i) for i in range(5)]
    assert [len(t) for t in engine.tiles(requests, layer)] == widths
    together = [layer.adapter(t.policy.digest) for t in layer.train(requests)]
    alone = build("alone", dtype="float64", bank=1)
    for request, ours in zip(requests, together, strict=True):
        theirs = alone.adapter(alone.train([request])[0].policy.digest)
        print("MAX", max((ours[n] - w).abs().max().item() for n, w in theirs.items()))
        assert all(torch.allclose(ours[n], w, rtol=0, atol=1e-8) for n, w in theirs.items())


def test_an_adapter_larger_than_the_memory_for_adapters_trains_alone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build()
    monkeypatch.setattr(layer.engine, "split", replace(layer.engine.split, bank_weights=1))
    assert len(layer.train([Train(layer.root, (Document("w1 w2"),), LORA, seed=i) for i in range(2)])) == 2


# ---- tiles ----


def work(layer: Models) -> tuple[Any, ...]:
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    trained = layer.train([Train(lower, (Document(f"w{i} w{i + 1}"), Document("w5")), LORA, seed=i) for i in range(5)])
    policies = [t.policy for t in trained]
    written = layer.generate([Generate(p, "w3", 6, seed=i) for i, p in enumerate(policies)])
    scored = layer.score([Score(p, "w3", "w4 w5") for p in policies])
    return trained, written, scored


def test_a_new_process_finds_the_tiles_and_pays_the_same(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(bank=2, rows=2)
    done = work(first)
    for call in ("generate", "score", "train"):
        monkeypatch.setattr(first.engine, call, None)
    again = build(bank=2, rows=2)
    assert work(again) == done
    assert {u: a for u, a in again.ledger.totals.items() if u != "seconds"} == {u: a for u, a in first.ledger.totals.items() if u != "seconds"}


def test_another_folder_makes_the_same_bits(build: Build, tmp_path: Path) -> None:
    assert work(build("one", bank=2)) == work(build("two", bank=2))
    ones, twos = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("tiles/*/*.safetensors")} for n in ("one", "two"))
    assert ones == twos
    assert len(ones) == 4


@pytest.mark.parametrize("reopen", [False, True])
@pytest.mark.parametrize("call", ["generate", "score", "train", "open"])
def test_pruned_weights_are_trained_again_wherever_they_are_wanted(build: Build, tmp_path: Path, call: str, reopen: bool) -> None:
    """The merged adapter below and the live one above are both gone, and the call that needs them is not memoised."""
    layer = build()
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    live = taught(layer, "w7 w8 w9", on=lower)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("tiles/*/*.safetensors")}
    whole = build("whole")
    kept = taught(whole, "w7 w8 w9", on=taught(whole, "w1 w2 w3", lora=MERGED))
    layer.retain([])
    assert not list((tmp_path / "run").glob("tiles/*/*.safetensors"))
    if reopen:
        layer = build()
    layer.score([Score(layer.root, "w1", "w2")])  # nothing is merged
    if call == "generate":
        assert texts(layer, [greedy(live, p) for p in PROMPTS]) == texts(whole, [greedy(kept, p) for p in PROMPTS])
    elif call == "score":
        assert layer.score([Score(live, "w7", "w8 w9")]) == whole.score([Score(kept, "w7", "w8 w9")])
    elif call == "train":
        taught(layer, "w5", on=lower)
        assert texts(layer, [greedy(live, p) for p in PROMPTS]) == texts(whole, [greedy(kept, p) for p in PROMPTS])
    else:
        with layer.open(live):
            opened = bits(layer.engine)
        whole.score([Score(whole.root, "w1", "w2")])  # unmerges, so that opening merges again
        with whole.open(kept):
            assert all(torch.equal(w, opened[n]) for n, w in bits(whole.engine).items())
    for name, content in before.items():
        assert next((tmp_path / "run").glob(f"tiles/*/{name}")).read_bytes() == content


def test_the_key_tells_engines_apart_that_may_differ(engines: Engines) -> None:
    keys = [engines(**o).key for o in ({}, {"dtype": "float64"}, {"step_tokens": 40})]
    assert len({str(k) for k in keys}) == 3
    assert engines().root == engines(rows=1).root
