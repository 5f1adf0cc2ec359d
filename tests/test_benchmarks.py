"""The benchmarks at a tiny size: the peers do the same work as the model layer, and every number that is promised comes out."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfimprove.models import Generate, Lora, Score
from selfimprove.tasks.biographies import Biographies

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of the peers' libraries


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model with as many layers as the default inner loop skips and a few more, and a tokenizer that knows the biographies."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p.text for p in Biographies(train=8, validation=0, test=0).people("train")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 21, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def inner_loop() -> Iterator[ModuleType]:
    """`benchmarks/inner_loop.py`, as Python finds it when the file is run."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("inner_loop")
    finally:
        sys.path.remove(str(BENCHMARKS))
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(inner_loop: ModuleType, tiny: str) -> Any:
    return inner_loop.Bench(tiny, "cpu", 1, small(inner_loop), "float32")


def small(inner_loop: ModuleType) -> Any:
    return inner_loop.Sizes(3, 2, 1, 2, 1, (2, 6), 2, 1, 2, repetitions=1)


def test_the_work_is_what_it_says(inner_loop: ModuleType) -> None:
    edits = inner_loop.self_edits(16, lambda text: 2 * len(text.split()))
    documents = [len(e.text.splitlines()) + 1 for e in edits]
    assert (min(documents), max(documents)) == (6, 12)
    assert all(len(e.answers) == len(e.item.questions) == 7 for e in edits)
    assert edits == inner_loop.self_edits(16, lambda text: 2 * len(text.split()))


def test_the_peers_answer_and_score_as_the_model_layer_does(inner_loop: ModuleType, bench: Any, tmp_path: Path) -> None:
    policies = inner_loop.adapted(bench, tmp_path)
    layer = bench.models(tmp_path / "again", tmp_path)
    asked = [Generate(p, text, n, temperature=0.0, stop=("a",)) for p in policies[:2] for text, n in (("Who was she", 9), ("Where", 5))]
    asked.append(Generate(layer.root, "Who was she", 7, temperature=0.0))
    assert layer.generate(asked) == bench.peers.generate(asked)
    scored = [Score(r.policy, r.prompt, text) for r in asked for text in (" Nobody", " in the old town of Tarmouth")]
    for ours, theirs in zip(layer.score(scored), bench.peers.score(scored), strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.logprob == pytest.approx(theirs.logprob, rel=1e-5)


def test_the_peers_train_the_same_tokens(inner_loop: ModuleType, bench: Any, tmp_path: Path) -> None:
    for strategy in (inner_loop.PAPER, inner_loop.DEFAULT):
        requests = bench.requests(strategy, 2, 3, 1)
        ours = sum(t.tokens for t in bench.models(tmp_path / strategy).train(requests))
        assert ours == sum(len(ids) for ids, _ in bench.encoded(requests))
        assert bench.peers.train(requests, ["a", "b"]).tokens == ours
        assert any((w != 0).any() for n, w in bench.peers.adapters["a"][0].items() if "lora_B" in n)
        assert not [n for n, _ in bench.peers.model.named_modules() if "lora" in n]


def test_useful_operations_are_those_of_the_linear_modules(bench: Any) -> None:
    """By hand, for a document of 5 tokens of which 2 carry loss."""
    flops = importlib.import_module("_machine").useful_flops
    linear = {n: m.weight.numel() for n, m in bench.peers.model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linear.pop("lm_head")
    body, layers = sum(linear.values()), 21
    lowest = sum(linear[f"model.layers.{layers - 1}.self_attn.{n}_proj"] for n in "qkv")
    document = ([1, 2, 3, 4, 5], 3)
    adapter = 2 * 4 * (16 + 16)  # q_proj and o_proj of one layer, rank 4
    one = flops(bench.peers.model, Lora(4, 8, ("q_proj", "o_proj"), 1e-3, 1, first_layer=layers - 1), [document])
    assert one == 5 * (2 * body + 2 * (body // layers - lowest) + 6 * adapter) + 2 * 4 * head


@pytest.mark.slow
def test_every_key_comes_out(
    inner_loop: ModuleType, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inner_loop, "QUICK", small(inner_loop))
    monkeypatch.setattr(
        sys, "argv", ["inner_loop.py", "--quick", "--model", tiny, "--dtype", "float32", "--threads", "1", "--out", str(tmp_path / "out.json")]
    )
    inner_loop.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line.keys() == {*inner_loop.KEYS, "details"}
    assert all(line[k] > 0 for k in inner_loop.KEYS)
    stated = " ".join(line["details"]["extrapolated"])
    assert all(part in stated for part in ("train.paper", "train.recipe", "generate.together", "score"))
    found = json.loads((tmp_path / "out.json").read_text())
    [tokens] = found["parts"]["round"]["tokens"]
    assert tokens["ours"]["trained_tokens"] == tokens["peer"]["trained_tokens"] > 0
    assert tokens["ours"]["scored_tokens"] == tokens["peer"]["scored_tokens"] > 0
    assert {"machine", "versions", "commit", "engine", "sizes"} <= found.keys()


def test_a_part_alone(inner_loop: ModuleType, bench: Any) -> None:
    keys, raw = inner_loop.score(bench)
    assert keys["score_x_naive"] > 0
    assert raw["largest_difference_in_nats"] < 1e-3
    assert raw["continuations"] == 3 * 7 * 2


@pytest.mark.slow
def test_growth_draws_what_it_measured(inner_loop: ModuleType, tiny: str, tmp_path: Path) -> None:
    growth = importlib.import_module("growth")
    points = [
        growth._apart(growth.Point(adapters=k, length=16, rank=2, steps=1), ["--model", tiny, "--device", "cpu", "--threads", "1"], 1) for k in (1, 3)
    ]
    assert [p["adapters"] for p in points] == [1, 3]
    assert all(p["train_seconds"] >= 0 and p["generate_seconds"] > 0 and p["peak_bytes_above_the_model"] > 0 for p in points)
    rows = {axis: [{**p, axis: v} for p, v in zip(points, (1, 3), strict=True)] for axis in growth.AXES}
    growth.plot(rows, tmp_path / "growth.svg")
    assert "adapters that train together" in (tmp_path / "growth.svg").read_text()
    assert growth.table(rows, "a test", "growth.json").count("| 3 |") == len(rows)


@pytest.mark.slow
def test_an_axis_of_growth_alone_stands_beside_the_others(inner_loop: ModuleType, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = importlib.import_module("growth")
    point = growth.Point(adapters=1, length=16, rank=2, steps=1)
    monkeypatch.setattr(growth, "AXES", {axis: (axis, (value,), point) for axis, value in (("adapters", 1), ("rank", 4))})
    words = ["growth.py", "--model", tiny, "--device", "cpu", "--threads", "1", "--repetitions", "1", "--out", str(tmp_path / "g.json")]
    for more in ([], ["--only", "rank"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        growth.main()
    found = json.loads((tmp_path / "g.json").read_text())
    assert {axis: points[0][axis] for axis, points in found["points"].items()} == {"adapters": 1, "rank": 4}
    assert ["--only" in found["runs"][axis]["how"] for axis in ("adapters", "rank")] == [False, True]
    assert "--only rank" in (tmp_path / "g.md").read_text()


@pytest.mark.parametrize("part", ["attention", "optimizer", "loss", "weights"])
def test_every_alternative_does_the_same_work(inner_loop: ModuleType, tiny: str, part: str) -> None:
    alternatives = importlib.import_module("alternatives")
    bench = alternatives.Bench(tiny, "cpu", 1, "float32")
    kinds = set()
    for work in alternatives.PARTS[part](bench):
        assert work.kind not in kinds, "the result keeps one of a name"
        kinds.add(work.kind)
        rows = alternatives.compare(work, bench.device, 1)
        assert next(iter(rows)).startswith("engine: ")
        assert next(iter(rows.values()))["ratio"] == 1
        for name, row in rows.items():
            assert "reason" not in row, name
            assert row["seconds"] > 0
            tolerance = 1e-5 if "float32" in work.kind or part != "attention" else 0.05
            assert row.get("difference", 0.0) < tolerance, name
            assert row.get("same_text", 1.0) == 1, name
    assert not bench.frozen.model._forward_hooks
    assert not [n for n, _ in bench.peers.model.named_modules() if "lora" in n]


def test_an_alternative_that_cannot_run_says_why(inner_loop: ModuleType) -> None:
    alternatives = importlib.import_module("alternatives")

    def lacking() -> None:
        raise NotImplementedError("no kernel\nat 0x1")

    work = alternatives.Work("work", "once", {"engine: ones": lambda: torch.ones(2), "theirs": lacking, "close": lambda: torch.tensor([1.0, 1.5])})
    rows = alternatives.compare(work, torch.device("cpu"), 2)
    assert rows["theirs"] == {"reason": "NotImplementedError: no kernel"}
    assert rows["close"]["difference"] == 0.5
    assert len(rows["close"]["runs"]) == 2
    assert "theirs: NotImplementedError: no kernel" in list(alternatives.table(work, rows))
