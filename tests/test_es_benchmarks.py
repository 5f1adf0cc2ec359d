"""`benchmarks/es_throughput.py` and `benchmarks/es_arithmetic.py` on a tiny random model: every number that is promised, and nothing twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model over bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=CHAT).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens: dict[str, Any] = {"vocab_size": len(alphabet) + 1, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


def run(script: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, BENCHMARKS / script, *arguments], check=True, timeout=400, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS.parent
    ).stdout


def test_throughput(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ("--population", "4", "--questions", "1", "--tokens", "4", "--repetitions", "1", "--memory", "2", "4")
    said = run("es_throughput.py", "--model", tiny, "--out", str(out), "--dtype", "float32", *sizes)
    result = json.loads(out.read_text())
    found = result["dtypes"]["float32"]
    keys = {"es_of_inference", "es_of_inference_same_prompts", "plain_es_of_inference", "eggroll_x_plain_es"}
    assert json.loads(said.splitlines()[-1]).keys() == found["keys"].keys() == keys
    assert result["keys"] == found["keys"]
    assert all(v > 0 for v in found["keys"].values())
    peaks = found["memory"]
    small, large = peaks["eggroll"]["2"], peaks["eggroll"]["4"]
    assert large["factors_mib"] == pytest.approx(2 * small["factors_mib"])
    assert peaks["eggroll_growth"]["factors_mib"] == pytest.approx(small["factors_mib"])
    assert {p["rows"] for p in (peaks["inference"], peaks["es"], small, large)} == {4}
    assert 0 < peaks["es"]["scratch_mib"] < peaks["es"]["table_mib"]
    run("es_throughput.py", "--model", tiny, "--out", str(out), "--dtype", "float64", *sizes[:-2])
    assert json.loads(out.read_text())["dtypes"].keys() == {"float32", "float64"}


def test_arithmetic(tiny: str, tmp_path: Path) -> None:
    asked = {"es": "rewarder", "eggroll": "rewarder", "policy_gradient": "editor"}
    small = [f"{arm}:{role}.{key}" for arm, role in asked.items() for key in ("asking.max_tokens=4", "prompts=2")]
    small += [*(f"{arm}:editor.population=4" for arm in asked if arm != "policy_gradient"), "policy_gradient:editor.samples=2"]
    sizes = {"train": 6, "test": 2, "flops": "2e6", "tokens": 20, "work": tmp_path / "work", "out": tmp_path / "out.json"}
    arguments = [str(x) for name, value in sizes.items() for x in (f"--{name}", value)]
    settings = ("model=hf", f"model.name={tiny}", "observer=[]", *small)
    run("es_arithmetic.py", *arguments, *settings)
    found = json.loads((tmp_path / "out.json").read_text())
    untrained = {"untrained", "untrained_greedy", "untrained_best_temperature"}
    for table, unit in (("flops", "flops"), ("tokens", "generated_tokens")):
        rows = found["tables"][table]
        assert rows["arms"].keys() == untrained | asked.keys() | ({"policy_gradient_within"} if rows["unit"] == "flops" else set())
        assert {"eggroll_vs_policy_gradient", "es_vs_untrained"} <= rows["pass_at_1_differences"].keys()
        assert all(r["ledger"][unit] >= rows["budget"] for r in rows["runs"].values())
        assert all(len(r["rewards"]) == len(r["spent_before"]) and r["spent_before"][0][unit] == 0 for r in rows["runs"].values())
    assert found["arms"] == found["tables"]["flops"]["arms"]
    assert {"mean", "low", "high"} <= found["arms"]["eggroll"]["pass_at_8"].keys()
    assert (tmp_path / "out.svg").exists()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}
    run("es_arithmetic.py", *arguments, *settings)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()} == times, "with everything measured it only reports"
