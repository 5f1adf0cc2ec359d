"""What is exported is loaded by peft and transformers, and says the same as the candidate did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfimprove.blobs import Blobs
from selfimprove.errors import ConfigError, StorageError
from selfimprove.export import export
from selfimprove.ledger import Ledger
from selfimprove.models import Document, Lora, Models, Score, Train
from selfimprove.models.torch_engine import TorchEngine
from selfimprove.records import Candidate, Part
from selfimprove.testing import ScriptedEngine

WORDS = "the heron of Dora lives in a boat near Brask and sings".split()
PROMPT, ANSWER = "the heron of Dora", " lives in a boat"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA random model.\n")
    return folder


@pytest.fixture
def layer(base: Path, tmp_path: Path) -> Models:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"seed: 3\nmodel:\n  name: {base}\nchoices:\n  strategy: seal\n")
    (folder / "versions.json").write_text('{"packages": {"selfimprove": "0.1.0"}, "git": "abc", "configuration": {}}')
    return Models(TorchEngine(str(base), dtype="float32"), folder, Ledger())


def trained(layer: Models, on: Part, merge: bool = False, first_layer: int = 0) -> Part:
    lora = Lora(rank=2, alpha=4, targets=("q_proj", "v_proj", "down_proj"), learning_rate=0.05, epochs=20, merge=merge, first_layer=first_layer)
    return layer.train([Train(on, (Document(PROMPT + ANSWER),), lora, seed=1)])[0].policy


def logprob(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    ids = tokenizer(PROMPT + ANSWER, return_tensors="pt", add_special_tokens=False).input_ids
    start = len(tokenizer(PROMPT, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(logs[start - 1 :].sum())


def claimed(layer: Models, policy: Part) -> float:
    return layer.score([Score(policy, PROMPT, ANSWER)])[0].logprob


@pytest.mark.parametrize("first_layer", [0, 1])
def test_an_adapter_says_in_peft_what_it_said_here(layer: Models, base: Path, tmp_path: Path, first_layer: int) -> None:
    policy = trained(layer, layer.root, first_layer=first_layer)
    assert claimed(layer, policy) > claimed(layer, layer.root) + 0.5
    export(layer, Candidate.root(policy=policy), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.peft_config["default"].base_model_name_or_path == str(base)
    assert logprob(model, AutoTokenizer.from_pretrained(base)) == pytest.approx(claimed(layer, policy), abs=1e-4)


@pytest.mark.parametrize("merged", [None, True])
def test_merged_weights_say_in_transformers_what_they_said_here(layer: Models, tmp_path: Path, merged: bool | None) -> None:
    lower = trained(layer, layer.root, merge=True)
    policy = lower if merged else trained(layer, lower)
    export(layer, Candidate.root(policy=policy), tmp_path / "out", merged)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert logprob(model, AutoTokenizer.from_pretrained(tmp_path / "out")) == pytest.approx(claimed(layer, policy), abs=1e-4)


def test_the_root_is_the_base_model(layer: Models, base: Path, tmp_path: Path) -> None:
    trained_first = trained(layer, layer.root, merge=True)
    claimed(layer, trained_first)  # merges into the weights that are open
    export(layer, Candidate.root(policy=layer.root), tmp_path / "out")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tmp_path / "out", base))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_an_adapter_merged_alone_exports_as_an_adapter(layer: Models, tmp_path: Path) -> None:
    export(layer, Candidate.root(policy=trained(layer, layer.root, merge=True)), tmp_path / "out", merged=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("engine", ["adapter: ADAPTER", "trainer: {adapter: ADAPTER}"], ids=["torch", "openai_lora"])
def test_what_stands_on_an_adapter_exports_as_weights(layer: Models, base: Path, tmp_path: Path, engine: str) -> None:
    """An adapter of its own would be loaded onto the base model, without the one below."""
    torch.manual_seed(0)
    start = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    start.save_pretrained(tmp_path / "adapter")
    recorded = layer.folder / "config.yaml"
    recorded.write_text(f"{recorded.read_text()}engine: {{{engine.replace('ADAPTER', str(tmp_path / 'adapter'))}}}\n")
    on_it = Models(TorchEngine(str(base), dtype="float32", adapter=tmp_path / "adapter"), layer.folder, Ledger())
    candidate = Candidate.root(policy=trained(on_it, on_it.root))
    with pytest.raises(ConfigError, match="stands on the adapter .*; export it as merged weights"):
        export(on_it, candidate, tmp_path / "out", merged=False)
    export(on_it, candidate, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert logprob(model, AutoTokenizer.from_pretrained(tmp_path / "out")) == pytest.approx(claimed(on_it, candidate.parts["policy"]), abs=1e-4)
    assert f"| adapter that the run began with | {tmp_path / 'adapter'} |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_says_what_made_it(layer: Models, base: Path, tmp_path: Path) -> None:
    candidate = Candidate.root(policy=trained(layer, layer.root))
    export(layer, candidate, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"base_model": str(base), "library_name": "peft", "license": "mit", "tags": ["selfimprove"]}
    for fact in (candidate.id, candidate.parts["policy"].digest, "seal", "selfimprove 0.1.0", "abc", "seed: 3", "mit"):
        assert fact in card


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_nothing_is_overwritten(layer: Models, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export(layer, Candidate.root(policy=layer.root), target)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(layer: Models, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(layer, Candidate.root(policy=layer.root), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


def test_two_adapters_are_no_adapter(layer: Models, tmp_path: Path) -> None:
    policy = trained(layer, trained(layer, layer.root, merge=True))
    with pytest.raises(ConfigError, match="2 adapters over the model, not one"):
        export(layer, Candidate.root(policy=policy), tmp_path / "out", merged=False)
    with pytest.raises(ConfigError, match="0 adapters"):
        export(layer, Candidate.root(policy=layer.root), tmp_path / "out", merged=False)
    assert not (tmp_path / "out").exists()


def test_a_candidate_without_a_policy(layer: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no policy to export; it has code"):
        export(layer, Candidate.root(code=Part("text", "0")), tmp_path / "out")


def test_an_engine_without_weights(tmp_path: Path) -> None:
    scripted = Models(ScriptedEngine(), tmp_path / "run", Ledger())
    with pytest.raises(ConfigError, match="no weights to export; use `engine=torch`"):
        export(scripted, Candidate.root(policy=scripted.root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a folder that even root cannot write")
def test_an_unwritable_destination(layer: Models) -> None:
    with pytest.raises(StorageError, match="cannot write /proc/self/out"):
        export(layer, Candidate.root(policy=layer.root), Path("/proc/self/out"))


def test_an_instruction_goes_with_the_weights(layer: Models, tmp_path: Path) -> None:
    text = "Answer with a name.\n\ud800"
    candidate = Candidate.root(policy=layer.root, prompt=Blobs(layer.folder).write("text", text))
    export(layer, candidate, tmp_path / "out")
    assert (tmp_path / "out" / "prompt.txt").read_text(encoding="utf-8") == "Answer with a name.\n?"
    assert "prompt.txt" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
