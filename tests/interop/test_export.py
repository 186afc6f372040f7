"""What `lora-jax export` writes, as transformers and PEFT read it: the logits are those of the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file

from lora_jax import load_model, merge, save_pretrained
from lora_jax.config.doors import FAMILIES
from lora_jax.interop.hf import architecture
from lora_jax.models.heads import LanguageModel
from lora_jax.sweeps.restore import restore_member
from lora_jax.sweeps.run import run_sweep
from lora_jax.sweeps.space import members_of
from lora_jax.tracking import Progress
from tests import tiny
from tests.interop.zoo import ZOO, Zoo
from tests.tiny_hub import call

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4  # absolute, float32; logits are of order 1
KINDS = {
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token_classification",
    "AutoModelForQuestionAnswering": "question_answering",
}
ADAPTER = {
    "adapter.targets": "all-linear",
    "adapter.rank": 3,
    "adapter.rank_pattern": {"q_proj": 2, r".*layers\.1\.mlp.*": 5},
    "adapter.rslora": True,
    "adapter.layers": "last:2",
    "adapter.bias": "lora_only",
    "optimizer.learning_rate": 0.05,
}


@pytest.fixture(scope="module")
def runs(hub, tmp_path_factory, compile_cache) -> dict[str, tuple[Path, Any]]:
    """Run directory and the model as it was trained, of a sequence classification and of a language model."""
    found = {}
    for name in ("classes", "words"):
        folder = tmp_path_factory.mktemp(name)
        config = hub.config(folder, {**ADAPTER, "task.max_length": 20}, causal=name == "words")
        run_sweep(config, fresh=False, progress=Progress(enabled=False))
        run = folder / "runs" / "tiny"
        found[name] = run, restore_member(run, members_of(config)[0])
    return found


def inputs(hub: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Real rows, padded on the right: tokens and mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub.llama if name == "words" else hub.bert)
    tokenizer.pad_token = tokenizer.pad_token or "</s>"
    rows = tokenizer(["a good film about people", "bad", "the story was poor in it : yes"], padding=True, return_tensors="np")
    return rows["input_ids"].astype(np.int32), rows["attention_mask"].astype(np.int32)


def theirs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits.numpy()


def ours(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with jax.disable_jit():
        return np.asarray((model.base if isinstance(model, LanguageModel) else model)(tokens, mask))


AUTO = {"classes": "AutoModelForSequenceClassification", "words": "AutoModelForCausalLM"}


@pytest.mark.parametrize("name", ["classes", "words"])
def test_a_merged_export_computes_what_was_trained(runs, hub, name, tmp_path):
    run, restored = runs[name]
    result = call("export", run, "--out", tmp_path / "hf")
    assert result.code == 0, result.err
    tokens, mask = inputs(hub, name)
    expected = ours(restored.model, tokens, mask)
    plain = ours(load_model(str(hub.llama)), tokens, mask) if name == "words" else None
    model = getattr(transformers, AUTO[name]).from_pretrained(tmp_path / "hf", dtype=torch.float32)
    got = theirs(model, tokens, mask)
    if name == "words":
        got, expected = got[mask == 1], expected[mask == 1]
        assert np.abs(expected - plain[mask == 1]).max() > 0.02  # the adapter shows
    else:
        assert model.config.id2label == {0: "neg", 1: "pos"} == dict(enumerate(restored.classes))
        assert np.abs(expected).max() > 0.02
    assert np.abs(got - expected).max() < TOLERANCE
    assert model.config.architectures == [type(model).__name__]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert again.get_vocab() == transformers.AutoTokenizer.from_pretrained(hub.llama if name == "words" else hub.bert).get_vocab()
    assert (tmp_path / "hf" / "generation_config.json").exists() == (name == "words")


@pytest.mark.parametrize("name", ["classes", "words"])
def test_an_exported_adapter_computes_what_was_trained(runs, hub, name, tmp_path):
    run, restored = runs[name]
    assert call("export", run, "--format", "peft", "--out", tmp_path / "peft").code == 0
    tokens, mask = inputs(hub, name)
    options = {"num_labels": 2} if name == "classes" else {}
    base = getattr(transformers, AUTO[name]).from_pretrained(hub.llama if name == "words" else hub.bert, dtype=torch.float32, **options)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    got, expected = theirs(model, tokens, mask), ours(restored.model, tokens, mask)
    where = mask == 1 if name == "words" else slice(None)
    assert np.abs(got[where] - expected[where]).max() < TOLERANCE
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ranks = {k: v.shape[0] for k, v in factors.items() if k.endswith("lora_A.weight")}
    assert set(ranks.values()) == {2, 3, 5} and not any(".layer.0." in k or ".layers.0." in k for k in ranks)


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.head in KINDS])
def test_a_loaded_head_is_saved_as_it_was(zoo: Zoo, name: str, tmp_path: Path):
    kind = KINDS[ZOO[name].head]
    save_pretrained(load_model(str(zoo.source(name)), head=kind), tmp_path / "saved")
    stored, saved = (load_file(folder / "model.safetensors") for folder in (zoo.source(name), tmp_path / "saved"))
    assert saved.keys() == stored.keys()
    for key, tensor in stored.items():
        assert saved[key].dtype == tensor.dtype and torch.equal(saved[key], tensor), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (zoo.source(name), tmp_path / "saved"))
    assert new["architectures"] == old["architectures"]
    assert new.get("id2label", {}) == {str(i): n for i, n in zoo.model(name).config.id2label.items()}


def test_classes_are_called_as_transformers_calls_them():
    from transformers.models.auto import modeling_auto

    for head, table in (
        (None, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        ("classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
        ("token_classification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
        ("question_answering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ):
        names = getattr(modeling_auto, table)
        for model_type, family in FAMILIES.all().items():
            if model_type in names and (head or family.kind == "decoder"):
                assert architecture(model_type, head) == names[model_type], (model_type, head)


def test_shards_and_dtypes(zoo: Zoo, tmp_path: Path):
    """A checkpoint in bfloat16 is loaded and merged in float32 and rounded once, shard by shard."""
    source = zoo.model("llama-mha-tied").to(torch.bfloat16)
    source.save_pretrained(tmp_path / "half")
    adapted = tiny.trained(load_model(str(tmp_path / "half")), targets=["q_proj", "down_proj"])
    save_pretrained(adapted, tmp_path / "saved", largest=20_000)
    files = sorted(p.name for p in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.dtype == torch.bfloat16
    kernel = np.asarray(load_model(str(tmp_path / "half")).layers.segments[0].block.attn.q_proj.kernel[1])
    site = adapted.layers.segments[-1].block.attn.q_proj
    exact = kernel + np.float32(site.scale[1]) * (np.asarray(site.lora_a[1], np.float64) @ np.asarray(site.lora_b[1], np.float64))
    saved = model.model.layers[1].self_attn.q_proj.weight.detach().float().numpy().T
    assert np.abs(saved - exact).max() > 0
    np.testing.assert_array_equal(saved, exact.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32))
    save_pretrained(adapted, tmp_path / "wide", dtype="float32")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert wide.dtype == torch.float32 and np.abs(wide.model.layers[1].self_attn.q_proj.weight.detach().numpy().T - exact).max() < 1e-6


@pytest.mark.parametrize("name", ["llama-mha-tied", "gpt2", "gpt_neox-serial"])
def test_an_adapted_embedding_parts_the_tied_projection(zoo: Zoo, name: str, tmp_path: Path):
    adapted = tiny.trained(load_model(str(zoo.source(name))), targets=r"embed|.*o_proj")
    save_pretrained(adapted, tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert model.config.tie_word_embeddings is False
    tokens = np.random.default_rng(0).integers(3, 100, (2, 9)).astype(np.int32)
    got = theirs(model, tokens, np.ones_like(tokens))
    assert np.abs(got - tiny.outputs(adapted, jnp.asarray(tokens))).max() < TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_adapted_experts_and_routers_are_merged(zoo: Zoo, name: str, tmp_path: Path):
    adapted = tiny.trained(load_model(str(zoo.source(name))), targets=["gate_up_proj", "down_proj", "router"])
    save_pretrained(adapted, tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(3, 100, (2, 9)).astype(np.int32)
    got, expected = theirs(model, tokens, np.ones_like(tokens)), tiny.outputs(adapted, jnp.asarray(tokens))
    assert np.abs(expected - tiny.outputs(load_model(str(zoo.source(name))), jnp.asarray(tokens))).max() > 0.02
    assert np.abs(got - expected).max() < TOLERANCE


def test_the_gguf_base(smollm2_source: str, tmp_path: Path):
    """Quantised weights are written in float32, with the config and the tokenizer that the file's metadata amounts to."""
    from lora_jax import load_tokenizer

    adapted = tiny.trained(load_model(smollm2_source), targets=["q_proj", "v_proj"], layers="last:4")
    save_pretrained(adapted, tmp_path / "saved")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32)
    mine, written = load_tokenizer(smollm2_source), transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "The film runs 12 minutes too long:\n  columns 7 and 8"
    assert written(text)["input_ids"] == mine(text)["input_ids"] and written.chat_template == mine.chat_template
    tokens = np.array([mine("The capital of France is")["input_ids"]], np.int32)
    got, expected = theirs(model, tokens, np.ones_like(tokens)), tiny.outputs(adapted, jnp.asarray(tokens))
    print(f"logits: {np.abs(got - expected).max():.1e} of {np.abs(expected).max():.0f}")
    assert np.abs(got - expected).max() < 5e-4  # its residual stream reaches 25,000: float32 itself is 4e-4 from float64


def test_a_merged_model_is_saved_as_an_adapted_one(hub, tmp_path):
    adapted = tiny.trained(load_model(str(hub.llama)), targets=["q_proj", "embed_tokens"])
    save_pretrained(adapted, tmp_path / "adapted")
    save_pretrained(merge(adapted), tmp_path / "merged")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("adapted", "merged"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
