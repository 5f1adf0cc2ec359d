"""Likelihoods are those of a whole forward pass for every text on its own, however they are computed together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfimprove.models import Models, Score, generate
from selfimprove.models.score import score

Build = Callable[..., Models]
Schools = Callable[..., Any]
Asked = Sequence[tuple[int, str, str]]
HEADER = " ".join(f"w{i}" for i in range(20))
PROMPTS = ("w3 w4 w5", "w9", "w3 w4 w7 w8 w9 w10 w11", "", HEADER, f"{HEADER} w30")
ENDS = ("w8", "", "w1 w2 w3 w4 w5 w6 w7", "w1 w2", "w8")


def logprobs(one: Any, asked: Asked) -> list[float]:
    return [x.logprob for x in one.layer.score([Score(one.policies[k], p, c) for k, p, c in asked])]


def alone(one: Any, asked: Asked) -> Any:
    return pytest.approx([one.peers[k].logprob(p, c) for k, p, c in asked], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"step_tokens": 9, "logit_rows": 3}, {"step_tokens": 1, "logit_rows": 1}], ids=["whole", "parts", "singly"])
@pytest.mark.parametrize("pupils", [(0,), (2,), (0, 1, 2, 3)])
def test_likelihoods_are_those_of_a_forward_pass(school: Schools, options: dict[str, int], pupils: Sequence[int]) -> None:
    """Several continuations of a prompt, none at all, the same one twice; several adapters; several passes."""
    one = school(**options)
    asked = [(k, p, c) for k in pupils for p in PROMPTS for c in ENDS]
    found = one.layer.score([Score(one.policies[k], p, c) for k, p, c in asked])
    assert [x.logprob for x in found] == alone(one, asked)
    assert [x.tokens for x in found] == [len(c.split()) for _, _, c in asked]
    assert [x.per_token for x in found] == [x.logprob / max(1, x.tokens) for x in found]


WORDS = st.lists(st.integers(0, 2), max_size=5).map(lambda ids: " ".join(f"w{i}" for i in ids))


@given(st.lists(st.tuples(st.integers(0, 3), WORDS, WORDS), min_size=1, max_size=9), st.integers(1, 20), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_likelihoods_over_ragged_shapes(school: Schools, asked: list[tuple[int, str, str]], step_tokens: int, chance: Any) -> None:
    """Few words, so that prompts have beginnings in common, which are computed apart from the first token on; in any order."""
    one = school()
    shuffled = chance.sample(asked, len(asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "LONG", 1)
        patch.setattr(one.layer.engine, "split", type(one.layer.engine.split)(step_tokens, 1, 1))
        patch.setattr(one.layer.engine, "logit_rows", 1 + step_tokens // 3)
        assert logprobs(one, asked) == alone(one, asked)
        assert logprobs(one, shuffled) == alone(one, shuffled)


@pytest.mark.parametrize("step_tokens", [4, 30, 1000])
def test_a_pass_holds_a_prompt_and_no_more_continuations_than_fit(school: Schools, monkeypatch: pytest.MonkeyPatch, step_tokens: int) -> None:
    """Attention within a row grows with its square, so one prompt's continuations are more than one row where they are many."""
    one = school()
    frozen, passes = one.layer.engine.frozen, []
    forward = frozen.forward
    monkeypatch.setattr(frozen, "forward", lambda ids, *rest, **more: (passes.append(ids.shape[1]), forward(ids, *rest, **more))[1])
    tile = [Score(one.layer.root, "w1 w2 w3", f"w{i} w5 w6") for i in range(40)]
    frozen.reset()
    found, tokens, targets = score(frozen, tile, None, [0] * 40, step_tokens, 64)
    assert max(passes) <= 3 + step_tokens
    assert (tokens, targets) == (40 * 5, 40 * 3)
    assert [x.logprob for x in found] == alone(one, [(0, r.prompt, r.continuation) for r in tile])


@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_turn_goes_through_the_template(school: Schools, chat: bool) -> None:
    one = school()
    [found] = one.layer.score([Score(one.layer.root, "w5 w6", "w7 w8", chat)])
    assert found.logprob == pytest.approx(one.peers[0].logprob("w0 w5 w6 w1 w2" if chat else "w5 w6", "w7 w8"), rel=1e-5)


@pytest.mark.parametrize("prompt", ["", "w1"])
def test_nothing_has_likelihood_one(build: Build, prompt: str) -> None:
    layer = build()
    nothing, something = layer.score([Score(layer.root, prompt, ""), Score(layer.root, prompt, "w4")])
    assert (nothing.logprob, nothing.tokens) == (0.0, 0)
    assert something.logprob < 0
    assert layer.score([Score(layer.root, prompt, "")])[0].per_token == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_likelihoods_of_all_next_words_sum_to_one(build: Build, dtype: str) -> None:
    """In bfloat16 too: its logits are normalised in float32."""
    layer = build(dtype=dtype)
    words = layer.engine.tokenizer.get_vocab()
    assert math.fsum(math.exp(x.logprob) for x in layer.score([Score(layer.root, "w3", w) for w in words])) == pytest.approx(1, abs=1e-5)


def test_scored_tokens_are_charged_as_if_every_text_were_scored_alone(school: Schools, build: Build) -> None:
    layer = build()
    layer.score([Score(layer.root, p, c) for p in ("w1 w2", "w1 w2", "w3") for c in ("w4", "w5 w6 w7", "")])
    assert layer.ledger.totals["scored_tokens"] == 2 * (2 + 4) + (1 + 3)
