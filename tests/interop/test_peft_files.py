"""Adapters out of PEFT and into it: what PyTorch computes with a file is what is computed here, and a round trip changes no bit."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_jax import InputError, LoraConfig, inject, load_model, load_peft, save_peft
from lora_jax.adapters.sites import find_sites
from tests.interop.drawing import drawn
from tests.interop.zoo import VOCAB, ZOO, Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # PEFT warns of much that is meant

TOLERANCE = 1e-4  # absolute, float32; logits are of order 1
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 9)).astype(np.int32)


KINDS = {
    "AutoModel": (None, "FEATURE_EXTRACTION"),
    "AutoModelForCausalLM": (None, "CAUSAL_LM"),
    "AutoModelForSequenceClassification": ("classification", "SEQ_CLS"),
    "AutoModelForTokenClassification": ("token_classification", "TOKEN_CLS"),
    "AutoModelForQuestionAnswering": ("question_answering", "QUESTION_ANS"),
}
CASES = ("attention", "all_linear", "patterns", "rslora", "embedding", "layers")


# Beside the first model of each family: what is different with a tied projection, and adapters on one that is not tied.
ALSO = (("gpt_neox-serial", "embedding"), ("gpt_neox-serial", "layers"), ("gpt_neox", "projection"), ("gpt2-untied", "projection"))
# Of mixtures of experts alone.
MIXED = ("experts", "down", "router")


def covering() -> list[Any]:
    """(model, case): every case for the first model of each family, and for the others one. `long` but for two or three a family."""
    firsts: list[str] = []
    pairs = []
    for name, entry in ZOO.items():
        if entry.head not in KINDS:  # an encoder-decoder: test_encoder_decoders.py
            continue
        # By name: what is added to the zoo changes nothing for the rest.
        turn = zlib.crc32(name.encode())
        cases, often = (CASES[turn % len(CASES)],), KINDS[entry.head][0] is not None and entry.family in ("bert", "llama")
        if entry.family not in firsts:
            firsts.append(entry.family)
            cases, often = CASES, False
        if "num_experts_per_tok" in entry.options:
            cases += MIXED
        for i, case in enumerate(cases):
            if case == "all_linear" and KINDS[entry.head][0] is not None:
                continue  # PEFT itself puts LoRA on most heads and then saves them, and fails
            quick = often or (name, case) in ALSO or case in MIXED or (cases[: len(CASES)] == CASES and (i - len(firsts)) % 3 == 0)
            pairs.append(pytest.param(name, case, marks=[] if quick else [pytest.mark.long]))
    return pairs + [pytest.param(*pair) for pair in ALSO if pair not in [p.values for p in pairs]]


def options_of(model: Any, task: str, case: str) -> dict[str, Any]:
    """Options of `peft.LoraConfig` for a model; between the cases every option that changes what an adapter computes."""
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and re.search(r"\.1\..*att", n)]
    layers = re.findall(r"([^.]+)\.1\.", linears[0])[0]
    attention = sorted({re.split(rf"(?:^|\.){layers}\.1\.", n)[-1] for n in linears})
    first, second = attention[0], attention[-1]
    saved = [n for n, m in model.named_modules() if "norm" in n.lower() and f"{layers}." not in n and list(m.parameters())]
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    options: dict[str, dict[str, Any]] = {
        "attention": {"r": 4, "lora_alpha": 8, "target_modules": attention},
        "all_linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "bias": "all"},
        "patterns": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": attention,
            "rank_pattern": {re.escape(first): 2, rf"{layers}\.1\..*{re.escape(second)}": 6},
            "alpha_pattern": {rf".*\.{layers}\.0\..*": 5, re.escape(second): 12.5},
            "bias": "lora_only",
        },
        "rslora": {
            "r": 3,
            "lora_alpha": 7,
            "target_modules": rf".*\.({re.escape(first)}|{re.escape(second)})",
            "exclude_modules": rf".*\.{layers}\.0\..*{re.escape(second)}",
            "use_rslora": True,
        },
        "embedding": {"r": 4, "lora_alpha": 8, "target_modules": [embedding.rsplit(".", 1)[-1], second], "modules_to_save": saved[-1:]},
        "layers": {"r": 4, "target_modules": attention, "layers_to_transform": [1], "layers_pattern": layers, "lora_dropout": 0.3},
        "projection": {"r": 2, "target_modules": [second, "lm_head"]},
    }
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options |= {
        "experts": {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": attention,
            "target_parameters": stacks,
            "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3},
            "alpha_pattern": {"gate_up_proj": 7},
        },
        "down": {"r": 3, "target_modules": [], "target_parameters": stacks[1:], "use_rslora": True},
        "router": {"r": 3, "target_modules": [second], "target_parameters": ["gate.weight", "gate_up_proj"]},
    }
    return options[case] | {"task_type": task}


def theirs(zoo: Zoo, name: str, case: str) -> Any:
    """A PEFT model whose trained numbers are all drawn."""
    torch.manual_seed(1)
    base = zoo.model(name)
    model = peft.get_peft_model(base, peft.LoraConfig(**options_of(base, KINDS[ZOO[name].head][1], case)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        out = model(input_ids=torch.tensor(TOKENS))
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()


def our_logits(model: nnx.Module) -> np.ndarray:
    with jax.disable_jit():  # an operation at a time: nothing to compile for each structure anew
        return np.asarray(model(TOKENS))  # pyright: ignore[reportCallIssue]


def as_sets(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: set(v) if isinstance(v, list) else v for k, v in config.items()}


def assert_same_files(one: Path, two: Path) -> None:
    assert as_sets(one) == as_sets(two)
    a, b = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


def our_model(zoo: Zoo, name: str) -> Any:
    return load_model(str(zoo.source(name)), head=KINDS[ZOO[name].head][0])


@pytest.mark.parametrize(("name", "case"), covering())
def test_from_peft_and_back(name: str, case: str, zoo: Zoo, tmp_path: Path):
    model = theirs(zoo, name, case)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_peft(our_model(zoo, name), tmp_path / "theirs")
    expected = their_logits(model)
    with model.disable_adapter():
        assert np.abs(their_logits(model) - expected).max() > 0.02  # the adapter shows
    assert np.abs(our_logits(ours) - expected).max() < TOLERANCE
    save_peft(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


def ours_of(base: nnx.Module, case: str) -> LoraConfig:
    """The cases as they are put here; some families have queries, keys and values in one projection."""
    names = {site.name.rsplit(".", 1)[-1] for site in find_sites(base)}
    first, second = ("qkv_proj", "o_proj") if "qkv_proj" in names else ("q_proj", "v_proj")
    values: dict[str, dict[str, Any]] = {
        "attention": {"rank": 4, "alpha": 8, "targets": "attention"},
        "all_linear": {"rank": 3, "alpha": 16, "targets": "all-linear", "layers": "last:1", "bias": "all"},
        "patterns": {
            "rank": 4,
            "targets": "all-linear",
            "rank_pattern": {first: 2, r"layers\.1\.attn.*": 6},
            "alpha_pattern": {second: 5.5},
            "bias": "lora_only",
        },
        "rslora": {"rank": 3, "alpha": 7, "targets": [first, "down_proj"], "exclude": r".*layers\.0\.attn.*", "rslora": True},
        "embedding": {"rank": 4, "targets": rf"(.*\.)?embed|.*{second}", "modules_to_save": [first], "dropout": 0.1},
        "layers": {"rank": 4, "targets": "attention" if "router" in names else "mlp", "modules_to_save": ["embed"]},
        "projection": {"rank": 2, "targets": ["o_proj", "lm_head"], "modules_to_save": ["final_norm"]},
    }
    values |= {
        "experts": {"rank": 2, "alpha": 5, "targets": "experts", "rank_pattern": {r"layers\.1\..*down_proj": 3}},
        "down": {"rank": 3, "targets": ["down_proj", "o_proj"], "layers": "last:1"},
        "router": {"rank": 3, "targets": ["router", "gate_up_proj"], "alpha_pattern": {"router": 2.5}},
    }
    return LoraConfig(**values[case])


@pytest.mark.parametrize(("name", "case"), covering())
def test_to_peft(name: str, case: str, zoo: Zoo, tmp_path: Path):
    base = our_model(zoo, name)
    ours = drawn(inject(base, ours_of(base, case), rngs=nnx.Rngs(0)))
    save_peft(ours, tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(zoo.model(name), str(tmp_path / "ours")).eval()
    assert np.abs(our_logits(ours) - their_logits(model)).max() < TOLERANCE
    assert as_sets(tmp_path / "ours")["use_rslora"] == (case == "rslora")
    assert as_sets(tmp_path / "ours")["task_type"] == KINDS[ZOO[name].head][1]
    save_peft(load_peft(base, tmp_path / "ours"), tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again")


def test_saved_embeddings_that_peft_writes_twice(zoo: Zoo, tmp_path: Path):
    """`modules_to_save` with `save_embedding_layers`: the wrapper's two copies lie beside the saved weight."""
    torch.manual_seed(1)
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    model = peft.get_peft_model(zoo.model("llama-mha-tied"), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    twice = "base_model.model.model.embed_tokens.modules_to_save.weight"
    assert twice in tensors
    adapted = load_peft(our_model(zoo, "llama-mha-tied"), tmp_path / "adapter")
    assert np.abs(our_logits(adapted) - their_logits(model)).max() < TOLERANCE
    save_peft(adapted, tmp_path / "again")
    assert np.abs(our_logits(load_peft(our_model(zoo, "llama-mha-tied"), tmp_path / "again")) - their_logits(model)).max() < TOLERANCE
    tensors[twice] = tensors[twice] + 1
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"embed_tokens\.modules_to_save\.weight.*different numbers"):
        load_peft(our_model(zoo, "llama-mha-tied"), tmp_path / "adapter")
