"""What the engine generates, scores and opens is what transformers and PEFT compute, row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from selfimprove.errors import ConfigError
from selfimprove.models import Document, Generate, Lora, Models, Score, Train, generate
from selfimprove.models.sampling import sample
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


def with_peft(tiny: Path, layer: Models, policy: Part) -> Any:
    """The policy's live adapter in PEFT."""
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(LORA.targets))
    model = get_peft_model(plain(tiny), config)
    set_peft_model_state_dict(model, dict(layer.adapter(policy.digest)))
    return model.eval()


def written(model: Any, engine: TorchEngine, prompt: str, tokens: int, chat: bool = False) -> str:
    ids = torch.tensor([engine.frozen.encode_prompt(prompt, chat)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    new = out[0, ids.shape[1] :].tolist()
    return str(engine.tokenizer.decode(new[:-1] if new[-1] in engine.frozen.stop_ids else new))


def texts(layer: Models, requests: list[Generate]) -> list[str]:
    return [c.text for c in layer.generate(requests)]


# ---- generate ----


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_greedy_texts_are_those_of_transformers(build: Build, tiny: Path, rows: int) -> None:
    layer = build(rows=rows)
    model = plain(tiny)
    found = texts(layer, [greedy(layer.root, p, 5 + i) for i, p in enumerate(PROMPTS)])
    assert found == [written(model, layer.engine, p, 5 + i) for i, p in enumerate(PROMPTS)]
    assert len(set(found)) > 3, "the random model says different things"


def test_greedy_texts_of_adapters_are_those_of_peft(build: Build, tiny: Path) -> None:
    layer = build()
    policies = [taught(layer, t, seed=i) for i, t in enumerate(("w1 w2 w3 w4", "w3 w4 w5 w40 w41 w42", "w20 w21"))]
    asked = [(p, q) for q in PROMPTS for p in policies]
    found = texts(layer, [greedy(p, q) for p, q in asked])
    models = {p: with_peft(tiny, layer, p) for p in policies}
    assert found == [written(models[p], layer.engine, q, 8) for p, q in asked]
    assert found[0] != found[1]


def test_a_chat_turn_goes_through_the_template(build: Build, tiny: Path) -> None:
    layer = build()
    [found] = texts(layer, [greedy(layer.root, "w5 w6", chat=True)])
    assert found == written(plain(tiny), layer.engine, "w0 w5 w6 w1 w2", 8)


def test_a_text_does_not_depend_on_its_neighbours(build: Build) -> None:
    """Alone, in a tile, in another order, next to longer rows: the same seed gives the same text."""
    layer = build("together", rows=32)
    policies = [layer.root, *(taught(layer, t, seed=i) for i, t in enumerate(("w1 w2", "w5 w6 w7")))]
    requests = [
        Generate(p, q, max_tokens=3 + (7 * i + k) % 23, temperature=0.7 + 0.1 * k, top_p=(1.0, 0.9, 0.5)[k], seed=100 * i + k)
        for i, q in enumerate(PROMPTS)
        for k, p in enumerate(policies)
    ]
    together = texts(layer, requests)
    backwards = texts(layer, requests[::-1])[::-1]
    single = build("alone", rows=1)
    renamed = dict(zip(policies, [single.root, *(taught(single, t, seed=i) for i, t in enumerate(("w1 w2", "w5 w6 w7")))], strict=True))
    alone = texts(single, [Generate(renamed[r.policy], r.prompt, r.max_tokens, r.temperature, r.top_p, r.seed) for r in requests])
    assert together == backwards == alone


def test_equal_prompts_with_other_seeds_differ_and_with_equal_seeds_do_not(build: Build) -> None:
    layer = build()
    found = texts(layer, [Generate(layer.root, "w3 w4", 20, seed=s) for s in (1, 2, 1)])
    assert found[0] == found[2] != found[1]


def test_a_shared_beginning_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "LONG", 2)
    """Prompts of one tile that begin alike are prefilled together; alone in a tile they are not."""
    prompts = [f"{' '.join(f'w{i}' for i in range(20))} w{k}" for k in range(5)]
    shared, single = build("shared", rows=32), build("single", rows=1)
    requests = [greedy(shared.root, p, 12) for p in prompts]
    assert texts(shared, requests) == texts(single, requests)
    adapted = [taught(m, "w4 w5 w6") for m in (shared, single)]
    assert texts(shared, [greedy(adapted[0], p, 12) for p in prompts]) == texts(single, [greedy(adapted[1], p, 12) for p in prompts])


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_what_prompts_have_in_common(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "LONG", 1)
        n = generate.common(prompts)
    assert len({tuple(p[:n]) for p in prompts}) == 1
    assert all(len(p) > n for p in prompts)
    if len(prompts) > 1 and all(len(p) > n + 1 for p in prompts):
        assert len({p[n] for p in prompts}) > 1


def test_where_a_completion_ends(build: Build) -> None:
    layer = build()
    [whole] = layer.generate([greedy(layer.root, "w3 w4 w5", 10)])
    assert whole.tokens <= 10
    words = whole.text.split()
    [cut] = layer.generate([greedy(layer.root, "w3 w4 w5", 3)])
    assert (cut.text.split(), cut.tokens, cut.finished) == (words[:3], 3, False)
    [stopped] = layer.generate([greedy(layer.root, "w3 w4 w5", 10, stop=(words[2], "nothing"))])
    assert stopped.finished
    assert words[2] not in stopped.text
    assert stopped.text.split() == words[: words.index(words[2])]
    assert stopped.tokens == words.index(words[2]) + 1


def test_the_end_of_text_ends_a_row_and_is_charged(build: Build) -> None:
    layer = build()
    policy = taught(layer, "w7 w8", lora=replace(LORA, epochs=60))
    [done] = layer.generate([greedy(policy, "w7", 30)])
    assert (done.text, done.tokens, done.finished) == ("w8", 2, True)
    assert layer.ledger.totals["generated_tokens"] == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_no_tokens_are_refused(build: Build, limit: int) -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        Generate(Part("model", "x"), "w1", limit)


@pytest.mark.parametrize("changes", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"temperature": -1.0}, {"temperature": math.nan}])
def test_sampling_settings_that_make_no_sense_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        Generate(Part("model", "x"), "w1", 4, **changes)  # type: ignore[arg-type]


# ---- sampling ----


def exact(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Holtzman et al.'s nucleus, the slow way."""
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        mass, kept = 0.0, torch.zeros_like(p)
        for i in p.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept[i], mass = p[i], mass + float(p[i])
        p = kept / kept.sum()
    return p


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (2.0, 0.5), (1.0, 1e-6)])
@pytest.mark.parametrize("vocabulary", [12, 700])
def test_frequencies_of_sampled_tokens(temperature: float, top_p: float, vocabulary: int) -> None:
    """A chi-square test against exact probabilities; 700 words of a flat distribution need more than the likeliest 512."""
    chance = torch.Generator().manual_seed(7)
    logits = torch.randn(vocabulary, generator=chance) * (2.0 if vocabulary == 12 else 0.3)
    count = 20_000
    request = Generate(Part("model", "x"), "", 1, temperature, top_p)
    tokens = sample(logits.expand(count, -1), [request] * count, torch.rand(count, generator=chance))
    p = exact(logits.double(), temperature, top_p)
    seen = torch.bincount(tokens, minlength=vocabulary).double()
    assert not seen[p == 0].any(), "a token outside the nucleus was drawn"
    expected = p[p > 0] * count
    if len(expected) > 1:
        chi = float(((seen[p > 0] - expected) ** 2 / expected).sum())
        degrees = len(expected) - 1
        assert chi < degrees + 5 * math.sqrt(2 * degrees)


def test_rows_are_sampled_by_their_own_settings() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 4)
    part = Part("model", "x")
    requests = [Generate(part, "", 1, 0.0), Generate(part, "", 1, 5.0), Generate(part, "", 1, 1.0, 0.5), Generate(part, "", 1, 0.01)]
    tokens = sample(logits, requests, torch.tensor([0.999, 0.999, 0.999, 0.999]))
    assert tokens.tolist() == [1, 2, 1, 1]


def test_first_tokens_of_real_requests_follow_the_model(build: Build, tiny: Path) -> None:
    layer = build()
    engine = layer.engine
    with torch.no_grad():
        p = plain(tiny)(torch.tensor([engine.frozen.encode_prompt("w3 w4", False)])).logits[0, -1].softmax(-1)
    found = Counter(texts(layer, [Generate(layer.root, "w3 w4", 1, seed=s) for s in range(1500)]))
    for word in p.topk(4).indices.tolist():
        share = float(p[word])
        text = engine.tokenizer.decode([word]) if word not in engine.frozen.stop_ids else ""
        assert abs(found[text] / 1500 - share) < 5 * math.sqrt(share * (1 - share) / 1500), text


# ---- score ----


def test_scores_are_those_of_a_padded_forward(build: Build, tiny: Path) -> None:
    layer = build()
    policies = [taught(layer, t, seed=i) for i, t in enumerate(("w1 w2 w3 w4", "w3 w4 w5 w40"))]
    models = {layer.root: plain(tiny), **{p: with_peft(tiny, layer, p) for p in policies}}
    asked = [(p, q, c) for p in models for q in PROMPTS for c in ("w8", "w1 w2 w3 w4 w5 w6 w7")]
    found = layer.score([Score(*a) for a in asked])
    for (policy, prompt, continuation), ours in zip(asked, found, strict=True):
        start, end = layer.engine.frozen.encode_prompt(prompt, False), layer.engine.frozen.encode(continuation)
        with torch.no_grad():
            logs = models[policy](torch.tensor([start + end])).logits[0, :-1].log_softmax(-1)
        theirs = logs.gather(1, torch.tensor(start + end)[1:, None])[len(start) - 1 :].sum()
        assert ours.logprob == pytest.approx(float(theirs), rel=1e-5, abs=1e-5)
        assert ours.tokens == len(end)
        assert ours.per_token == pytest.approx(ours.logprob / len(end))


@pytest.mark.parametrize("prompt", ["", "w1"])
def test_nothing_has_likelihood_one(build: Build, prompt: str) -> None:
    layer = build()
    nothing, something = layer.score([Score(layer.root, prompt, ""), Score(layer.root, prompt, "w4")])
    assert (nothing.logprob, nothing.tokens) == (0.0, 0)
    assert something.logprob < 0
    assert layer.score([Score(layer.root, prompt, "")])[0].per_token == 0.0


def test_likelihoods_of_all_next_words_sum_to_one(build: Build) -> None:
    layer = build()
    words = [w for w in layer.engine.tokenizer.get_vocab() if w.startswith("w")]
    mass = sum(math.exp(x.logprob) for x in layer.score([Score(layer.root, "w3", w) for w in words]))
    assert 0.5 < mass <= 1 + 1e-5  # the rest is <unk> and <eos>


@pytest.mark.parametrize("text", ["a\ud800b", "\x00\x1b[31m", "\u202e", "é" * 300, "\n\n", " ", "\U0001f600 w3"])
def test_hostile_texts(build: Build, text: str) -> None:
    layer = build()
    assert math.isfinite(layer.score([Score(layer.root, text, text)])[0].logprob)
    [trained] = layer.train([Train(layer.root, (Document(text), Document(text, prompt=text), Document(text, prompt=text, chat=True)), LORA)])
    assert layer.generate([Generate(trained.policy, text, 3, stop=(text,)), Generate(trained.policy, text, 3, chat=True)])


# ---- merged and live adapters ----


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


def test_an_open_policy_says_what_its_live_adapter_says(build: Build) -> None:
    layer = build()
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    for policy in (layer.root, lower, taught(layer, "w3 w4 w5 w40 w41", on=lower), taught(layer, "w20 w21")):
        scored = layer.score([Score(policy, "w3 w4", "w5 w6 w7")])[0].logprob
        said = texts(layer, [greedy(policy, p) for p in PROMPTS])
        with layer.open(policy) as model, torch.no_grad():
            ids = torch.tensor([layer.engine.frozen.encode("w3 w4 w5 w6 w7")])
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert float(logs[1:].sum()) == pytest.approx(scored, abs=1e-4)
            assert [written(model, layer.engine, p, 8) for p in PROMPTS] == said


def test_an_adapter_on_a_merged_policy_stands_on_it(build: Build) -> None:
    layer = build()
    lower = taught(layer, "w1 w2 w3", lora=MERGED)
    untrained = taught(layer, "w9", on=lower, lora=replace(LORA, epochs=0))
    one, two = layer.score([Score(p, "w1", "w2 w3") for p in (lower, untrained)])
    assert one.logprob == pytest.approx(two.logprob, abs=1e-6)
    assert one.logprob > layer.score([Score(layer.root, "w1", "w2 w3")])[0].logprob


def test_a_live_adapter_is_no_ground_to_train_on(build: Build) -> None:
    layer = build()
    live = taught(layer, "w1 w2")
    with pytest.raises(ConfigError, match="merge=true"):
        taught(layer, "w3", on=live)


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
