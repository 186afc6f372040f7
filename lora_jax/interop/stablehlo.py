"""`--format stablehlo`: the forward pass as a serialised program of any batch and length, which JAX alone loads and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from ..config.doors import EXPORTERS
from ..errors import RunError
from ..sweeps.restore import Restored
from ..weights.safetensors import Tensor, write_safetensors
from .card import model_card, write_card
from .export import Exporter, ExportOptions, Runtime
from .hf import write_reader
from .program import Program, array_lines, program_of, program_reason

MANIFEST, PROGRAM, WEIGHTS = "manifest.json", "program.stablehlo", "weights.safetensors"
# What the manifest's keys mean; a new number where that changes.
VERSION = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def write_program(program: Program, folder: Path, more: dict[str, Any] | None = None) -> None:
    """Writes the program, its weights beside it, and a manifest that says what they are.

    Args:
        program: the model.
        folder: an existing one.
        more: further keys of the manifest.

    Raises:
        RunError: JAX cannot export it.
    """
    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in program.weights.items()}
    try:
        exported = export.export(jax.jit(program.call), platforms=list(PLATFORMS))(weights, *program.specs())
    except Exception as error:  # JAX raises several kinds where a shape cannot be symbolic
        raise RunError(f"JAX cannot export this model for any batch and length: {str(error).strip().splitlines()[0]}") from error
    (folder / PROGRAM).write_bytes(bytes(exported.serialize()))
    arrays = {name: np.asarray(array) for name, array in program.weights.items()}
    write_safetensors(folder / WEIGHTS, {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()})
    manifest = {
        "format": "lora-jax.program",
        "version": VERSION,
        "program": PROGRAM,
        "weights": WEIGHTS,
        "inputs": [one.to_json() for one in program.inputs],
        "outputs": [program.output.to_json()],
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | (more or {}), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class StableHLOExporter(Exporter):
    """A program for JAX alone."""

    summary = "The forward pass as a StableHLO program of any batch and length, for JAX alone."
    runtime = Runtime(MANIFEST, "run_jax.py", "jax")

    def can(self, restored: Restored) -> str | None:
        """Why there is no such program; None where there is."""
        return program_reason(restored.model)

    def write(self, restored: Restored, folder: Path, options: ExportOptions) -> None:
        """Program, weights, manifest, tokenizer and a card."""
        program = program_of(restored.model)
        write_program(program, folder, {"classes": list(restored.classes)} if restored.classes else None)
        write_reader(folder, restored.member.config.model.source)
        usage = [
            "import json, jax, numpy as np",
            "from jax import export",
            "",
            f'raw = memoryview(open("PATH/{WEIGHTS}", "rb").read())',
            'start = 8 + int.from_bytes(raw[:8], "little")',
            'entries = [(k, v) for k, v in json.loads(bytes(raw[8:start])).items() if k != "__metadata__"]',
            'weights = {k: np.frombuffer(raw[start:][slice(*v["data_offsets"])], "f4").reshape(v["shape"]) for k, v in entries}',
            f'program = export.deserialize(open("PATH/{PROGRAM}", "rb").read())',
            f"{program.output.name} = program.call(weights, {', '.join(one.name for one in program.inputs)})",
            "",
            *(f"# {line}" for line in array_lines([*program.inputs, program.output])),
        ]
        summary = "`{base}` with a trained adapter merged into its weights, as a program for JAX."
        write_card(folder, model_card(restored, library="jax", relation="finetune", summary=summary, usage=usage))


EXPORTERS.register("stablehlo", StableHLOExporter())
