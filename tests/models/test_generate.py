"""Generated texts are those of `model.generate`, whatever flies beside them, and sampled tokens follow the model's distribution."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from selfimprove.errors import ConfigError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Lora, Models, Train, generate
from selfimprove.models.sampling import sample
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part

Build = Callable[..., Models]
Engines = Callable[..., TorchEngine]
PROMPTS = ("w3 w4 w5", "w9", "w3 w4 w7 w8 w9 w10 w11", "", "w3 w4 w5", "w30 w31 w32 w33")
HEADER = " ".join(f"w{i}" for i in range(20))
LORA = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), learning_rate=0.05, epochs=3)


def taught(layer: Models, text: str, lora: Lora = LORA, seed: int = 0) -> Part:
    return layer.train([Train(layer.root, (Document(text),), lora, seed)])[0].policy


def greedy(policy: Part, prompt: str, tokens: int = 8, **options: Any) -> Generate:
    return Generate(policy, prompt, tokens, temperature=0.0, **options)


def texts(layer: Models, requests: Sequence[Generate]) -> list[str]:
    return [c.text for c in layer.generate(requests)]


# ---- greedy ----


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_greedy_texts_are_those_of_transformers_and_peft(school: Callable[..., Any], rows: int) -> None:
    """The model and three adapters, ragged prompts and lengths, the same prompt twice; fewer rows than requests, so rows are taken over."""
    one = school(rows=rows)
    asked = [(k, p, 1 + (5 * i + 3 * k) % 11) for i, p in enumerate(PROMPTS) for k in range(4)]
    found = one.layer.generate([greedy(one.policies[k], p, n) for k, p, n in asked])
    assert [c.text for c in found] == [one.peers[k].text(p, n) for k, p, n in asked]
    assert [c.tokens for c in found] == [len(one.peers[k].ids(p, n)) for k, p, n in asked]
    assert len({c.text for c in found}) > len(found) / 2, "the random model says different things"


@pytest.mark.parametrize("far", [0, 1000], ids=["looked at twice", "copied to rows"])
@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("pupils", [(0,), (2,), (1, 2, 3)])
def test_a_common_beginning_changes_nothing(
    school: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pupils: tuple[int, ...], rows: int, far: int
) -> None:
    """One prompt is the beginning itself, one comes twice."""
    monkeypatch.setattr(generate, "LONG", 2)
    monkeypatch.setattr(generate, "FAR", far)
    one = school(rows=rows)
    asked = [(k, f"{HEADER}{tail}", 3 + i) for k in pupils for i, tail in enumerate(("", " w30", " w31 w32 w33", " w30", " w40 w41"))]
    requests = [greedy(one.policies[k], p, n, seed=10 * far + rows) for k, p, n in asked]
    encoded = [one.layer.engine.frozen.encode_prompt(r.prompt, False) for r in requests]
    assert generate.common(encoded, len(pupils)) == 19
    assert texts(one.layer, requests) == [one.peers[k].text(p, n) for k, p, n in asked]


def test_a_chat_turn_goes_through_the_template(school: Callable[..., Any]) -> None:
    one = school()
    [found] = texts(one.layer, [greedy(one.layer.root, "w5 w6", chat=True)])
    assert found == one.peers[0].text("w0 w5 w6 w1 w2", 8)


def test_few_cached_tokens_let_one_row_fly_at_a_time(school: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one = school()
    requests = [greedy(one.policies[k], p, 9) for p in PROMPTS for k in range(1, 4)]
    engine = one.layer.engine
    monkeypatch.setattr(engine, "split", dataclasses.replace(engine.split, cache_tokens=1))
    assert generate.Decoder(engine.frozen, requests, None, [0] * len(requests), 32, 1).rows.data.shape[2] == 1
    assert texts(one.layer, requests) == [one.peers[k].text(p, 9) for p in PROMPTS for k in range(1, 4)]


# ---- rows ----


class Watched(generate.Decoder):
    """A decoder that says how many rows fly and wait whenever tokens are drawn."""

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).append((len(self.flying), len(self.waiting)))
        return super()._sample(logits)


@torch.inference_mode()
def watched(engine: TorchEngine, lengths: Sequence[int], rows: int) -> list[tuple[int, int]]:
    requests = [Generate(engine.root, f"w{i % 7} w{i}", n, seed=i) for i, n in enumerate(lengths)]
    engine.frozen.reset()
    decoder = Watched(engine.frozen, requests, None, [0] * len(requests), rows, 2**40)
    assert [c.tokens <= n for c, n in zip(decoder.run(), lengths, strict=True)] == [True] * len(lengths)
    return list(decoder.__dict__["seen"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 9))
@settings(max_examples=15)
def test_finished_rows_make_room(engines: Engines, lengths: list[int], rows: int) -> None:
    """No more rows fly than may, and while requests wait less than a quarter of the rows are idle."""
    capacity = min(rows, len(lengths))
    for flying, waiting in watched(engines(), lengths, rows):
        assert 0 < flying <= capacity
        assert not waiting or capacity - flying < max(1, capacity // 4)


def test_short_rows_follow_one_another_beside_a_long_one(engines: Engines) -> None:
    """Twelve rows two by two would take 12 + 5 steps."""
    assert len(watched(engines(), [12] + [1] * 11, rows=2)) <= 12


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 2**31))
def test_rows_that_stay_keep_their_keys(engines: Engines, flags: list[bool], seed: int) -> None:
    """The kept rows are all there once, lengths and keys with them, and only those move that have to."""
    chance = torch.Generator().manual_seed(seed)
    rows = generate._Rows(engines().frozen, len(flags), 5)
    rows.count, rows.width = len(flags), 5
    rows.data.copy_(torch.randn(rows.data.shape, generator=chance))
    rows.lengths.copy_(torch.randint(1, 6, (len(flags),), generator=chance))
    data, lengths = rows.data.clone(), rows.lengths.clone()
    kept = [i for i, stays in enumerate(flags) if stays]
    places = rows.drop(kept)
    assert sorted(places) == kept
    assert rows.count == len(kept)
    assert sum(to != at for to, at in enumerate(places)) == sum(at >= len(kept) for at in kept)
    for to, at in enumerate(places):
        assert torch.equal(rows.data[:, :, to], data[:, :, at])
        assert rows.lengths[to] == lengths[at]


# ---- neighbours ----

WORDS = st.lists(st.integers(0, 5), max_size=6).map(lambda ids: " ".join(f"w{i}" for i in ids))
REQUESTS = st.lists(
    st.tuples(st.integers(0, 3), WORDS, st.integers(1, 9), st.sampled_from((0.0, 0.7, 1.3)), st.sampled_from((1.0, 0.8)), st.integers(0, 2**63 - 1)),
    min_size=2,
    max_size=6,
)


@given(REQUESTS, st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_a_text_does_not_depend_on_its_neighbours(school: Callable[..., Any], drawn: list[Any], chance: Any) -> None:
    """Alone, in a tile, in another order, in fewer rows, after a common beginning: the same seed gives the same text.

    In float64, since a number that falls between two tokens as float32 rounds them would make any text another.
    """
    many, few = school(dtype="float64"), school(dtype="float64", rows=2)

    def ask(one: Any, order: Sequence[int]) -> list[str]:
        requests = [Generate(one.policies[k], *rest, stop=("w7",)) for k, *rest in drawn]
        found = dict(zip(order, texts(one.layer, [requests[i] for i in order]), strict=True))
        return [found[i] for i in range(len(drawn))]

    order = list(range(len(drawn)))
    together = ask(many, order)
    alone = [texts(many.layer, [Generate(many.policies[k], *rest, stop=("w7",))])[0] for k, *rest in drawn]
    chance.shuffle(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "LONG", 1)
        patch.setattr(generate, "FAR", chance.choice((0, 1000)))
        assert together == alone == ask(few, order)


def test_a_text_does_not_depend_on_how_long_its_neighbours_are(school: Callable[..., Any]) -> None:
    one = school(dtype="float64")
    requests = [Generate(one.policies[k], p, 3 + (7 * i + k) % 40, 0.7 + 0.1 * k, seed=100 * i + k) for i, p in enumerate(PROMPTS) for k in range(4)]
    assert texts(one.layer, requests) == [texts(one.layer, [r])[0] for r in requests]


def test_equal_prompts_with_other_seeds_differ_and_with_equal_seeds_do_not(build: Build) -> None:
    layer = build()
    found = texts(layer, [Generate(layer.root, "w3 w4", 20, seed=s) for s in (1, 2, 1)])
    assert found[0] == found[2] != found[1]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_what_prompts_have_in_common(prompts: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "LONG", 1)
        n = generate.common(prompts)
    assert len({tuple(p[:n]) for p in prompts}) == 1
    assert all(len(p) > n for p in prompts)
    if len(prompts) > 1 and all(len(p) > n + 1 for p in prompts):
        assert len({p[n] for p in prompts}) > 1


# ---- where texts end ----


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


def check_stops(layer: Models, request: Generate, ids: Sequence[int], stops: Sequence[tuple[str, ...]]) -> None:
    """Every completion is the text before the first stop, and has the tokens up to the one that made it whole."""
    decode = layer.engine.tokenizer.decode  # type: ignore[attr-defined]
    found = layer.generate([dataclasses.replace(request, stop=stop) for stop in stops])
    for stop, completion in zip(stops, found, strict=True):
        needed = next(n for n in range(1, len(ids) + 1) if any(s in decode(ids[:n]) for s in stop))
        text = decode(ids[:needed])
        assert (completion.text, completion.tokens, completion.finished) == (text[: min(text.find(s) for s in stop if s in text)], needed, True), stop


def test_stops_within_words_and_across_them(school: Callable[..., Any]) -> None:
    one = school()
    peer, prompt = one.peers[2], "w3 w4"
    ids, text = peer.ids(prompt, 12), peer.text(prompt, 12)
    slices = sorted({text[a : a + n] for a in range(len(text)) for n in (1, 3, 6, 11) if a + n <= len(text)})
    assert len(slices) > 30
    stops = [*((s,) for s in slices), *((a, b, "never said") for a, b in zip(slices, slices[7:], strict=False))]
    check_stops(one.layer, greedy(one.policies[2], prompt, 12), ids, stops)


def test_stops_of_characters_that_are_several_tokens(tmp_path: Path, small: dict[str, Any]) -> None:
    """Tokens are bytes, so that a character is up to four of them; adapters learn what to say."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(("<eos>", *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**small | {"vocab_size": 257, "eos_token_id": 0, "hidden_size": 64})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    layer = Models(TorchEngine(str(tmp_path / "model"), dtype="float32"), tmp_path / "run", Ledger())
    said = "l'été à 30 € \U0001f600 déjà"
    lora = Lora(rank=8, alpha=32, targets=("q_proj", "v_proj", "up_proj", "down_proj"), learning_rate=0.01, epochs=60)
    [trained] = layer.train([Train(layer.root, (Document(said, prompt="x"),), lora)])
    request = greedy(trained.policy, "x", 60)
    assert texts(layer, [request]) == [said]
    ids = layer.engine.frozen.encode(said)  # type: ignore[attr-defined]
    assert len(ids) > len(said)
    check_stops(layer, request, ids, [(said[a : a + n],) for n in (1, 2, 5) for a in range(len(said) - n + 1)])


def test_the_end_of_text_ends_a_row_and_is_charged(build: Build) -> None:
    layer = build()
    policy = taught(layer, "w7 w8", lora=dataclasses.replace(LORA, epochs=60))
    [done] = layer.generate([greedy(policy, "w7", 30)])
    assert (done.text, done.tokens, done.finished) == ("w8", 2, True)
    assert layer.ledger.totals["generated_tokens"] == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_no_tokens_are_refused(limit: int) -> None:
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


def test_first_tokens_of_real_requests_follow_the_model(school: Callable[..., Any]) -> None:
    one = school()
    layer, engine = one.layer, one.layer.engine
    with torch.no_grad():
        p = one.peers[0].model(torch.tensor([engine.frozen.encode_prompt("w3 w4", False)])).logits[0, -1].softmax(-1)
    found = Counter(texts(layer, [Generate(layer.root, "w3 w4", 1, seed=s) for s in range(1500)]))
    for word in p.topk(4).indices.tolist():
        share = float(p[word])
        text = engine.tokenizer.decode([word]) if word not in engine.frozen.stop_ids else ""
        assert abs(found[text] / 1500 - share) < 5 * math.sqrt(share * (1 - share) / 1500), text
