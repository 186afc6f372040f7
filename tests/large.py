"""Random models of any size on disk, written and loaded in processes whose memory is measured."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np


def write_llama(folder: Path, *, width: int, hidden: int, depth: int, vocab: int) -> int:
    """A Llama in float32 safetensors, written tensor by tensor; returns the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "hidden_size": width, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": hidden,
        "num_hidden_layers": depth, "vocab_size": vocab, "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for i in range(depth):
        layer = f"model.layers.{i}."
        for name, out, inside in (
            ("self_attn.q_proj", width, width), ("self_attn.k_proj", width // 2, width), ("self_attn.v_proj", width // 2, width),
            ("self_attn.o_proj", width, width), ("mlp.gate_proj", hidden, width), ("mlp.up_proj", hidden, width),
            ("mlp.down_proj", width, hidden),
        ):  # fmt: skip
            shapes[f"{layer}{name}.weight"] = (out, inside)
        shapes |= {f"{layer}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write((0.02 * rng.standard_normal(math.prod(shape), np.float32)).tobytes())
    return at


_LOAD = """
import json, sys, zlib
from pathlib import Path
import numpy as np
source, devices, index, count, address = sys.argv[1:]
import jax
jax.config.update("jax_num_cpu_devices", int(devices))
if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(count), int(index))
from lora_jax.config.schema import MeshConfig
from lora_jax.models.load import BaseFiles
from lora_jax.parallel.mesh import make_mesh

def status(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

mesh = make_mesh(MeshConfig(fsdp=-1))
files = BaseFiles(source)
before = status("VmRSS")
model = files.load(mesh)
kernel = model.layers.segments[0].block.mlp.down_proj.kernel[...]
told = {"before": before, "peak": status("VmHWM")}
told["held"] = {str(s.index): zlib.crc32(np.asarray(s.data).tobytes()) for s in kernel.addressable_shards}
print(json.dumps(told))
"""


def load_in_processes(source: Path, *, count: int, devices: int) -> list[dict]:
    """Loads a model in `count` new processes of `devices` CPU devices each, cut over all of them.

    Returns:
        for each process: `before` and `peak`, bytes in its memory before it loaded and at most; `held`, checksums of a
        weight's parts on its devices.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", _LOAD, str(source), str(devices)]
    running = [
        subprocess.Popen([*command, str(i), str(count), address], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    told = []
    for process in running:
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]
        told.append(json.loads(out.splitlines()[-1]))
    return told
