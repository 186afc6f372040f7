"""Does compiling the train step of a SmolLM2-shaped decoder take longer with more layers?

    python experiments/benchmarks/compile_time.py [--rounds 5] [--output FILE.json]

Lowers and compiles the packed train step (one member, rank 8 on q_proj and v_proj, batch 8 x 128) for 6 and for 30 layers, alternately,
from shapes alone: no weights are allocated. Reports the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.adapters.inject import inject_layout
from lora_jax.adapters.layout import resolve, unite
from lora_jax.adapters.partition import partition
from lora_jax.config.schema import Config
from lora_jax.models.decoder import Decoder, DecoderConfig
from lora_jax.models.heads import LanguageModel
from lora_jax.models.layers import BlockConfig, LayerKind
from lora_jax.models.positions import Rotary
from lora_jax.packing.execution import PackPrograms
from lora_jax.training.optimizer import hyper_of
from lora_jax.training.step import MemberFixed, init_member

DEPTHS = (6, 30)
ROWS, LENGTH = 8, 128


def compile_seconds(depth: int) -> float:
    """Seconds to trace, lower and compile the step of a decoder with `depth` layers."""
    shape = {"width": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 1536}
    block = BlockConfig(**shape, activation="silu", gated=True, norm="rms", norm_eps=1e-5)
    shapes = DecoderConfig(block, depth, 49152, (LayerKind(rotary=Rotary(64, 100000.0)),), tied=True)
    model = nnx.eval_shape(lambda: LanguageModel(Decoder(shapes, rngs=nnx.Rngs(0))))
    config = Config.model_validate(
        {
            "name": "compile",
            "model": {"source": "none"},
            "task": {"kind": "causal_lm", "source": "none", "text": "text"},
            "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
            "training": {"steps": 10},
        }
    )
    part = partition(inject_layout(model, unite(model, [resolve(model, config.adapter)])))
    fixed = MemberFixed(hyper_of(config, 10), part.settings, None)
    state = jax.eval_shape(lambda t, f: init_member(part, t, f), part.trainable, fixed)
    packed = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *np.shape(a)), a.dtype), (state, fixed))
    rows = {name: jax.ShapeDtypeStruct((1, ROWS, LENGTH), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    targets = {name: jax.ShapeDtypeStruct((1, ROWS * LENGTH), jnp.int32) for name in ("target_index", "target_ids")}
    weights = {"target_weights": jax.ShapeDtypeStruct((1, ROWS * LENGTH), jnp.float32)}
    jax.clear_caches()
    began = time.perf_counter()
    PackPrograms(part).train.lower(*packed, part.frozen, rows | targets | weights, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return time.perf_counter() - began


def main() -> None:
    """Measures in turn and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    compile_seconds(DEPTHS[0])  # warms up imports and XLA itself
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    for _ in range(args.rounds):
        for depth in DEPTHS:
            seconds[depth].append(compile_seconds(depth))
    medians = {depth: statistics.median(values) for depth, values in seconds.items()}
    report = {
        "command": "python " + " ".join(sys.argv),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "seconds": {str(depth): values for depth, values in seconds.items()},
        "median_seconds": {str(depth): value for depth, value in medians.items()},
        "ratio": medians[DEPTHS[1]] / medians[DEPTHS[0]],
    }
    print(json.dumps(report, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
