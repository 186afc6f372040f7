"""Small random encoder-decoders, their batches, and folders of them with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import processors

from lora_jax.config.doors import FAMILIES
from lora_jax.data.batching import BatchPlan, Examples
from lora_jax.data.pairs import Shift, source_target
from lora_jax.models.encoder_decoder import EncoderDecoder
from lora_jax.models.heads import LanguageModel
from lora_jax.models.tensors import aliases, base_tensors
from lora_jax.weights.provenance import Origin
from lora_jax.weights.safetensors import write_checkpoint
from tests import tiny
from tests.tiny_hub import WORDS, _tokenizer

START = 0


def hf_config(family: str, **options: Any) -> dict[str, Any]:
    """A Hugging Face config: three layers in the encoder, two in the decoder, of 4 heads."""
    shape: dict[str, Any] = {"model_type": family, "d_model": tiny.WIDTH, "vocab_size": tiny.VOCAB, "decoder_start_token_id": START}
    if family in ("t5", "mt5"):
        shape |= {"d_kv": 8, "d_ff": 2 * tiny.WIDTH, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
        shape |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "feed_forward_proj": "gated-gelu"}
    else:
        for half, depth in (("encoder", 3), ("decoder", 2)):
            shape |= {f"{half}_layers": depth, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 2 * tiny.WIDTH}
        shape |= {"max_position_embeddings": 64, "activation_function": "gelu"}
    return shape | options


def base(family: str = "t5", *, seed: int = 0, **options: Any) -> EncoderDecoder:
    """A family's model; `options` are of its Hugging Face config."""
    config = FAMILIES.all()[family].config(hf_config(family, **options), jnp.float32)
    model = tiny.random_model(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)), seed)
    model.site_aliases = nnx.static(aliases(FAMILIES.all()[family].weights(config)))
    return model


def model(family: str = "t5", **options: Any) -> LanguageModel:
    """As the training step takes it."""
    return LanguageModel(base(family, **options))


def examples(count: int, seed: int = 0, *, longest: int = 12, vocab: int = tiny.VOCAB) -> Examples:
    """Random sources and targets of 1 to `longest` tokens; a target begins as its source does, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        source = rng.integers(2, vocab, int(rng.integers(1, longest + 1))).tolist()
        target = [*source[:3], *rng.integers(2, vocab, int(rng.integers(0, longest - 3))).tolist(), 1]
        made.append(source_target(source, target, Shift(START), longest))
    return Examples.of(made)


def plan(*, batching: str = "packed", batch_size: int = 8, accumulate: int = 1, row_multiple: int = 1, steps: int = 6) -> BatchPlan:
    """Batches of such examples."""
    options = {"batching": batching, "batch_size": batch_size, "accumulate": accumulate, "row_multiple": row_multiple, "steps": steps}
    return BatchPlan(examples(40), examples(9, 1), per_example=False, **options)


def write(folder: Path, family: str = "t5", **options: Any) -> Path:
    """A checkpoint in `folder`, with a tokenizer whose texts end in `</s>`."""
    first = ("<pad>", "</s>", "<unk>")
    folder.mkdir(parents=True)
    hf = hf_config(family, vocab_size=len(first) + len(WORDS), eos_token_id=1, pad_token_id=0, **options)
    one = base(family, **{key: value for key, value in hf.items() if key != "model_type"})
    one.origin = nnx.static(Origin.of(str(folder), hf, ""))
    write_checkpoint(folder, base_tensors(one), largest=2**30)
    (folder / "config.json").write_text(json.dumps(hf))
    tokenizer = _tokenizer(folder, first, "<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
