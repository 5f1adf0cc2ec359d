"""Which models open; they then compute what transformers computes. What is said of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from selfimprove.errors import ConfigError
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Generate, Lora, Models, Score, Train
from selfimprove.models.torch_engine import TorchEngine

Save = Callable[..., None]
LORA = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj"), learning_rate=0.05, epochs=3, first_layer=1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
        ("Qwen3", {"head_dim": 8, "sliding_window": 4, "use_sliding_window": False}),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": None}),
        ("SmolLM3", {}),
        ("Olmo2", {}),
    ],
)
def test_models_of_llamas_build_say_what_transformers_says(
    tmp_path: Path, small: dict[str, Any], tokenizer: Save, kind: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**small | changes))
    model.save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    (tmp_path / "run").mkdir()
    layer = Models(TorchEngine(str(tmp_path / "model"), dtype="float32"), tmp_path / "run", Ledger())
    prompts = ("w3 w4 w5", "w3 w4 w7 w8 w9", "w20")
    for prompt, scored in zip(prompts, layer.score([Score(layer.root, p, "w6 w7") for p in prompts]), strict=True):
        ids = torch.tensor([layer.engine.frozen.encode(f"{prompt} w6 w7")])
        with torch.no_grad():
            logs = model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert scored.logprob == pytest.approx(float(logs[-2:].sum()), abs=1e-4)
    [trained] = layer.train([Train(layer.root, (Document("w3 w4 w5 w6"),), LORA)])
    for policy in (layer.root, trained.policy):
        written = [c.text for c in layer.generate([Generate(policy, p, 6, temperature=0) for p in prompts])]
        with layer.open(policy) as opened:
            for prompt, text in zip(prompts, written, strict=True):
                ids = torch.tensor([layer.engine.frozen.encode(prompt)])
                out = opened.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
                new = [t for t in out[0, ids.shape[1] :].tolist() if t != 1]
                assert text == layer.engine.tokenizer.decode(new)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("GPTNeoX", {}, "its layers, final norm or head are elsewhere"),
        ("Granite", {"logits_scaling": 4.0}, "its logits_scaling is set"),
        ("Cohere", {"logit_scale": 0.1}, "its logit_scale is set"),
        ("Gemma2", {"head_dim": 8}, "its final_logit_softcapping is set"),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None}, "its attn_logit_softcapping is set"),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None, "attn_logit_softcapping": None}, "its attention slides a window"),
        ("Mistral", {"sliding_window": 4}, "its attention slides a window"),
        ("Mistral", {}, "its attention slides a window"),
        ("Qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, "its attention slides a window"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}, "its rotary embedding is dynamic, .*"),
    ],
)
def test_a_model_of_another_build_is_refused_when_it_is_opened(
    tmp_path: Path, small: dict[str, Any], tokenizer: Save, kind: str, changes: dict[str, Any], reason: str
) -> None:
    """Other names, logits that are scaled after the head, windows: refused, and not computed wrongly."""
    config = getattr(transformers, f"{kind}Config")(**small | changes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=rf"{kind}ForCausalLM\) is not built as Llama is \({reason}\), .*choose another"):
        TorchEngine(str(tmp_path), dtype="float32")


@pytest.mark.parametrize("kind", ["StableLm", "Nemotron"])
def test_a_model_that_keeps_its_attention_to_itself_is_refused(tmp_path: Path, small: dict[str, Any], tokenizer: Save, kind: str) -> None:
    """Its layers hand nothing on to the attention, which would see all rows of a pass as one text."""
    torch.manual_seed(1)
    getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**small)).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=rf"{kind}ForCausalLM\) computes something else here .*choose another model"):
        TorchEngine(str(tmp_path), dtype="float32")


def test_texts_begin_as_the_tokenizer_begins_them(tmp_path: Path, small: dict[str, Any], tokenizer: Save) -> None:
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    saved.backend_tokenizer.post_processor = TemplateProcessing(single="w40 $A", special_tokens=[("w40", 42)])
    saved.save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    layer = Models(TorchEngine(str(tmp_path / "model"), dtype="float32"), tmp_path / "run", Ledger())
    frozen = layer.engine.frozen
    assert frozen.encode_prompt("w3 w4", chat=False) == saved("w3 w4").input_ids == [42, 5, 6]
    assert frozen.encode_document(Document("w3 w4")) == ([42, 5, 6, 1], 1)
    assert frozen.encode_document(Document("w4", prompt="w3")) == ([42, 5, 6, 1], 2)
    assert 42 not in frozen.encode_prompt("w3", chat=True)  # whose template says what it begins with
    [scored] = layer.score([Score(layer.root, "w3 w4", "w6 w7")])
    ids = saved("w3 w4 w6 w7", return_tensors="pt").input_ids
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert scored.logprob == pytest.approx(float(logs[-2:].sum()), abs=1e-4)


def test_a_turn_ends_as_the_template_ends_it(tmp_path: Path, small: dict[str, Any], tokenizer: Save) -> None:
    config = transformers.LlamaConfig(**small | {"eos_token_id": [1, 3]})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)  # whose template ends a turn with w1, token 3
    frozen = TorchEngine(str(tmp_path), dtype="float32").frozen
    assert frozen.encode_document(Document("w4", prompt="w3", chat=True))[0][-1] == 3
    assert frozen.encode_document(Document("w4", prompt="w3"))[0][-1] == 1


def test_what_a_token_costs_does_not_depend_on_the_head_being_tied(tmp_path: Path, small: dict[str, Any], tokenizer: Save) -> None:
    costs = []
    for tied in (True, False):
        folder = tmp_path / str(tied)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | {"tie_word_embeddings": tied})).save_pretrained(folder)
        tokenizer(folder)
        frozen = TorchEngine(str(folder), dtype="float32").frozen
        costs.append((frozen.body_flops, frozen.head_flops))
    assert costs[0] == costs[1]


def test_a_folder_without_a_tokenizer(tmp_path: Path, small: dict[str, Any]) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not open"):
        TorchEngine(str(tmp_path))


def test_a_tokenizer_without_an_end_of_text(tmp_path: Path, small: dict[str, Any], tokenizer: Save) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | {"eos_token_id": None})).save_pretrained(tmp_path)
    tokenizer(tmp_path, eos_token=None)
    with pytest.raises(ConfigError, match="end-of-text"):
        TorchEngine(str(tmp_path))


def test_a_tokenizer_without_a_chat_template(tmp_path: Path, small: dict[str, Any], tokenizer: Save) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(tmp_path)
    tokenizer(tmp_path, chat_template=None)
    engine = TorchEngine(str(tmp_path), dtype="float32")
    assert engine.frozen.encode_prompt("w1", chat=False) == [3]
    with pytest.raises(ConfigError, match="no chat template"):
        engine.frozen.encode_prompt("w1", chat=True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "unheard-of"}', '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_broken_configuration(tmp_path: Path, tokenizer: Save, content: str) -> None:
    tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"model '{tmp_path}' does not open: .*give a folder"):
        TorchEngine(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"])
def test_broken_weights(tmp_path: Path, small: dict[str, Any], tokenizer: Save, content: bytes | None) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    weights = tmp_path / "model.safetensors"
    if content is None:
        weights.unlink()
    else:
        weights.write_bytes(content)
    with pytest.raises(ConfigError, match="does not open"):
        TorchEngine(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float33", "nn", "", "int8"])
def test_a_dtype_that_is_none(tiny: Path, dtype: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.dtype"):
        TorchEngine(str(tiny), dtype=dtype)


def test_a_device_that_is_none(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device"):
        TorchEngine(str(tiny), device="gpu")


def test_bfloat16_runs(tiny: Path, tmp_path: Path) -> None:
    layer = Models(TorchEngine(str(tiny), dtype="bfloat16"), tmp_path, Ledger())
    [trained] = layer.train([Train(layer.root, (Document("w3 w4 w5 w6"),), Lora(2, 4, ("q_proj", "down_proj"), 0.05, 20))])
    before, after = (layer.score([Score(p, "w3", "w4 w5 w6")])[0].logprob for p in (layer.root, trained.policy))
    assert after > before
    assert all(str(w.dtype) == "torch.float32" for w in layer.adapter(trained.policy.digest).values())
    assert layer.generate([Generate(trained.policy, "w3", 4)])[0].tokens >= 1


def test_the_root_is_its_weights(tiny: Path, tmp_path: Path) -> None:
    engine = TorchEngine(str(tiny), dtype="float32")
    assert engine.root == TorchEngine(str(tiny), dtype="float32").root
    assert engine.root != TorchEngine(str(tiny), dtype="float64").root
    config = json.loads((tiny / "config.json").read_text())
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    other.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    assert TorchEngine(str(tmp_path), dtype="float32").root != engine.root
