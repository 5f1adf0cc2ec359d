"""A run may begin with any LoRA adapter that PEFT wrote, and mix plain ones: a model with one is what PEFT says it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from selfimprove import config
from selfimprove.errors import ConfigError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Lora, Models, Score, Train
from selfimprove.models.adapters import unsupported
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.testing import ScriptedEngine

Build = Callable[..., Models]

PROMPTS = ("w3 w4 w5", "w9", "w3 w4 w7 w8 w9 w10 w11")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}


def saved(model: Any, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder with a random adapter, as PEFT saves it."""
    torch.manual_seed(seed)
    get_peft_model(model, LoraConfig(**LORA | changes)).save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 1, "target_modules": "all-linear"},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 20}, "layers_to_transform": [1, 2]},
        {"task_type": None, "target_modules": r".*\.[02]\.self_attn\.[kv]_proj"},
    ],
    ids=lambda c: "-".join(c) or "default",
)
def test_a_model_with_an_adapter_says_what_peft_says(tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter", **changes)
    model = PeftModel.from_pretrained(plain(tiny), folder).eval()
    (tmp_path / "run").mkdir()
    layer = Models(TorchEngine(str(tiny), dtype="float32", adapter=folder), tmp_path / "run", Ledger())
    encode = layer.engine.frozen.encode
    for prompt, scored in zip(PROMPTS, layer.score([Score(layer.root, p, "w6 w7") for p in PROMPTS]), strict=True):
        ids = torch.tensor([encode(f"{prompt} w6 w7")])
        with torch.no_grad():
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert scored.logprob == pytest.approx(float(logs[-2:].sum()), rel=1e-4)
    for prompt, written in zip(PROMPTS, layer.generate([Generate(layer.root, p, 6, temperature=0) for p in PROMPTS]), strict=True):
        ids = torch.tensor([encode(prompt)])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert written.text == layer.engine.tokenizer.decode([t for t in out[0, ids.shape[1] :].tolist() if t != 1])
    assert layer.root != TorchEngine(str(tiny), dtype="float32").root


@pytest.mark.parametrize("trainer", ["bank", "trl"])
def test_what_is_trained_stands_on_it(tiny: Path, tmp_path: Path, trainer: str) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter")
    engine = TorchEngine(str(tiny), dtype="float32", adapter=folder)
    (tmp_path / "run").mkdir()
    layer = Models(engine, tmp_path / "run", Ledger())
    lora = Lora(2, 4, ("q_proj", "v_proj"), 0.02, 20, merge=True, trainer=trainer)
    [trained] = layer.train([Train(layer.root, (Document("w3 w4 w5"),), lora)])
    before, after = layer.score([Score(p, "w3", "w4 w5") for p in (layer.root, trained.policy)])
    assert after.logprob > before.logprob
    with layer.open(layer.root) as model:
        original = PeftModel.from_pretrained(plain(tiny), folder).merge_and_unload().state_dict()
        assert all(torch.equal(original[n], w) for n, w in model.state_dict().items())


def test_the_root_is_the_model_and_the_adapter(tiny: Path, tmp_path: Path) -> None:
    one, two = (saved(plain(tiny), tmp_path / str(seed), seed) for seed in (1, 2))
    roots = [TorchEngine(str(tiny), dtype="float32", adapter=a).root for a in (one, two, one, None)]
    assert roots[0] == roots[2]
    assert len({r.digest for r in roots}) == 3


def refused(tiny: Path, folder: Path, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.adapter=.* cannot be merged into this model: .*{reason}.*; give a folder that PEFT wrote"):
        TorchEngine(str(tiny), dtype="float32", adapter=folder)


def test_a_folder_without_an_adapter(tiny: Path, tmp_path: Path) -> None:
    refused(tiny, tmp_path / "nowhere", "no such folder")
    refused(tiny, tmp_path, "Can't find 'adapter_config.json'")
    refused(tiny, tiny, "Can't find 'adapter_config.json'")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"peft_type": "UNHEARD_OF"}'])
def test_a_broken_configuration(tiny: Path, tmp_path: Path, content: str) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    refused(tiny, folder, "")


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_broken_weights(tiny: Path, tmp_path: Path, content: bytes | None) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    if content is None:
        weights.unlink()
    else:
        weights.write_bytes(content)
    refused(tiny, folder, "")


@pytest.mark.parametrize(
    ("sizes", "changes", "reason"),
    [
        ({"hidden_size": 16}, {}, ""),
        ({"num_hidden_layers": 4}, {}, "4 of its weights and the model's do not belong together, such as .*layers.3."),
        ({"num_hidden_layers": 2}, {}, "4 of its weights and the model's do not belong together, such as .*layers.2."),
    ],
)
def test_an_adapter_of_another_model(
    tiny: Path, tmp_path: Path, small: dict[str, Any], sizes: dict[str, int], changes: dict[str, Any], reason: str
) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | sizes))
    refused(tiny, saved(model, tmp_path / "adapter", **changes), reason)


def test_an_adapter_of_modules_that_the_model_lacks(tiny: Path, tmp_path: Path, small: dict[str, Any]) -> None:
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**small))
    refused(tiny, saved(model, tmp_path / "adapter", target_modules=["query_key_value"]), "query_key_value")


def test_an_adapter_of_another_kind(tiny: Path, tmp_path: Path) -> None:
    """Virtual tokens are no weights of the model."""
    get_peft_model(plain(tiny), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)
    refused(tiny, tmp_path, "")


def test_an_adapter_on_copies_of_layers(tiny: Path, tmp_path: Path) -> None:
    refused(tiny, saved(plain(tiny), tmp_path / "adapter", layer_replication=[[0, 2], [1, 3]]), "layer_replication is set")


def test_weights_that_are_no_numbers(tiny: Path, tmp_path: Path) -> None:
    adapted = get_peft_model(plain(tiny), LoraConfig(**LORA))
    next(p for n, p in adapted.named_parameters() if "lora_A" in n).data.fill_(torch.nan)
    adapted.save_pretrained(tmp_path)
    refused(tiny, tmp_path, "NaN")


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("changes", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_that_is_the_embeddings_too(tmp_path: Path, small: dict[str, Any], tokenizer: Callable[..., None], changes: dict[str, Any]) -> None:
    """Merging into it would change what the model reads."""
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    refused(tmp_path / "model", saved(plain(tmp_path / "model"), tmp_path / "adapter", **changes), "tie_word_embeddings")


def test_it_is_an_option_of_the_engine_and_goes_on_from_any_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    composed = config.compose(["strategy=seal", "model=hf", f"model.name={tiny}", "engine.adapter=mine"])
    config.check(composed)
    assert config.anchored(composed).values["engine"]["adapter"] == str(tmp_path / "mine")


# ---- adapters that are mixed ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1, 2]},
        {"target_modules": r".*\.[kv]_proj"},
        {"target_modules": [f"model.layers.{n}.mlp.up_proj" for n in range(3)]},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_an_adopted_adapter_is_what_peft_says(build: Build, tiny: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter", **changes)
    layer = build()
    [adopted] = layer.adopt([folder])
    model = PeftModel.from_pretrained(plain(tiny), folder).eval()
    with torch.no_grad():
        logs = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)  # w3 is token 5
    [found] = layer.score([Score(adopted, "w3 w4", "w5 w6")])
    assert found.logprob == pytest.approx(float(logs[1, 7] + logs[2, 8]), abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [0, 2]}, r"it lacks .*layers\.1\.self_attn\.q_proj\.lora_A\.weight \(and 3 more\); .*engine\.adapter="),
        ({"target_modules": r".*\.[02]\.self_attn\.[kv]_proj"}, r"it lacks .*layers\.1\.self_attn\.k_proj"),
        ({"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"]}, r"it lacks .*layers\.0\.mlp\.up_proj"),
        ({"exclude_modules": r".*layers\.1\..*"}, r"it lacks .*layers\.1\.self_attn\.q_proj"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set: it sits on copies of layers"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is set: it counts only after certain tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' moved the weights below it too; convert it"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' moved the weights below it too"),
        ({"use_rslora": True}, "no LoRA of one rank and scale: use_rslora is set"),
        ({"rank_pattern": {"q_proj": 1}}, "no LoRA of one rank and scale: rank_pattern is set"),
        ({"modules_to_save": ["lm_head"]}, "it holds .*lm_head"),
    ],
)
def test_an_adapter_that_a_bank_does_not_compute_is_refused(build: Build, tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    layer = build()
    folder = saved(plain(tiny), tmp_path / "adapter", **changes)
    with pytest.raises(ConfigError, match=message) as e:
        layer.adopt([folder])
    assert str(folder) in str(e.value)
    assert not (layer.folder / "parts.jsonl").exists(), "nothing is recorded"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 4}, r"it has .*layers\.3\.\S+, which this model has not \(and 3 more\)"),
        ({"num_hidden_layers": 2}, r"it lacks .*layers\.2\."),
        ({"hidden_size": 16}, r"lora_A\.weight is \(4, 16\), and this model wants \(4, 32\)"),
    ],
)
def test_an_adapter_of_another_model_is_not_adopted(build: Build, tmp_path: Path, small: dict[str, Any], sizes: dict[str, int], message: str) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | sizes)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=message):
        build().adopt([saved(plain(tmp_path / "other"), tmp_path / "adapter")])


def test_an_adapter_that_says_nothing_sensible_is_refused(build: Build, tiny: Path, tmp_path: Path) -> None:
    folder = saved(plain(tiny), tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    for wrong, message in (({"lora_alpha": 0}, "alpha > 0"), ({"r": 0}, "rank >= 1"), ({"r": 8}, r"is \(4, 32\), and this model wants \(8, 32\)")):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **wrong}))
        with pytest.raises(ConfigError, match=message):
            build().adopt([folder])
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="it holds no weights"):
        build().adopt([folder])


def test_a_scripted_model_adopts_nothing(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no modules that it could sit on; choose engine=torch"):
        Models(ScriptedEngine(), tmp_path, Ledger()).adopt([saved(plain(tiny), tmp_path / "adapter")])


def test_what_no_merge_computes() -> None:
    assert unsupported({}) is None
    assert unsupported(LoraConfig(**LORA | {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}).to_dict()) is None
    for name, value in (("layer_replication", [(0, 2)]), ("alora_invocation_tokens", [1])):
        assert name in (unsupported(LoraConfig(**LORA | {name: value}).to_dict()) or "")
