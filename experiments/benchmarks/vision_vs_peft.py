"""A vision transformer's training compared with PEFT on PyTorch: accuracy on held-out photographs, images a second, peak memory.

    python experiments/benchmarks/vision_vs_peft.py --model FOLDER --images FOLDER [--steps N] [--rounds N] [--seeds N] [--output FILE.json]

--model is a DINOv2 checkpoint, --images the ants and bees of PyTorch's tutorial; the recipe is that of `configs/ants_bees.yaml` for rank 8
on the attention of all layers. Needs the `[interop]` extra. Speed is measured as in `vs_peft.py`: each side in its own process, rounds of
N steps in turn. Then each side trains the whole recipe with every seed: lora-jax in one pack, PEFT one after the other.

PEFT is given images that our own code has decoded and resized, and flips them at random itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _sides import side_environment, warn_if_busy
from _vs_peft_cases import Case
from _vs_peft_worker import LoraJax, Peft, serve
from vs_peft import SIDES, alternate, device_name

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "ants_bees.yaml"
# What we aim for: images a second over PEFT's, and peak memory over PEFT's.
TARGETS = {"speed": 1.3, "memory": 0.8}


class Recipe(Case):
    """The member's whole config, its optimizer too."""

    def full_config(self, steps: int) -> dict[str, Any]:
        """The config of a run of so many optimizer steps."""
        return self.config | {"training": self.config["training"] | {"steps": steps}}


def recipe(model: str, images: str, more: list[str]) -> Recipe:
    """Rank 8 on the attention of all layers and `more`, as a plain config."""
    from lora_jax import load_config

    values = {"model.source": model, "task.source": images, "task.eval_source": images, "sweep": None}
    values |= {"adapter.rank": 8, "adapter.targets": "attention"}
    config = load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in values.items()] + more)
    return Recipe(config.model_dump(mode="json", exclude_unset=True), "IMAGE_CLASSIFICATION")


def prepare(case: Recipe, folder: str) -> None:
    """Writes what the PEFT side reads: uint8 pixels as our evaluations see them, and classes."""
    from lora_jax.config.schema import Config
    from lora_jax.training.setup import set_up

    data: Any = set_up(Config.model_validate(case.full_config(1))).data
    for name, examples in (("train", data.train), ("held_out", data.held_out)):
        pixels = np.stack([examples.pixels(i) for i in range(len(examples))])
        np.savez(Path(folder) / f"{name}.npz", pixels=pixels, classes=examples.classes, tokens=examples.length)


class PeftImages(Peft):
    """transformers' DINOv2 classifier with PEFT's LoRA, its head trained beside; AdamW and a cosine schedule."""

    def __init__(self, case: Recipe, folder: Path, steps: int, seed: int = 0):
        import peft
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX does by default; nothing on a CPU
        torch.manual_seed(seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.data = {name: dict(np.load(folder / f"{name}.npz")) for name in ("train", "held_out")}
        labels = int(self.data["train"]["classes"].max()) + 1
        source, adapter, optimizer = case.config["model"]["source"], case.config["adapter"], case.config["optimizer"]
        base = transformers.Dinov2ForImageClassification.from_pretrained(source, dtype=torch.float32, num_labels=labels)
        sites = ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = peft.LoraConfig(r=adapter["rank"], lora_alpha=adapter["alpha"], target_modules=sites, modules_to_save=["classifier"])
        self.model = peft.get_peft_model(base, lora).to(self.device).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=optimizer["learning_rate"], weight_decay=optimizer.get("weight_decay", 0.0))
        self.schedule = transformers.get_cosine_schedule_with_warmup(self.optimizer, optimizer["warmup_steps"], steps)
        self.random = torch.Generator().manual_seed(seed)
        self.flip, self.tokens = case.config["task"]["flip"], int(self.data["train"]["tokens"])
        self.batches = self._batches(case.batch_size)
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def _batches(self, size: int) -> Iterator[dict[str, Any]]:
        import torch

        while True:
            for chosen in torch.randperm(len(self.data["train"]["classes"]), generator=self.random).split(size):
                if len(chosen) == size:
                    yield self._batch("train", chosen.numpy())

    def _batch(self, part: str, chosen: np.ndarray) -> dict[str, Any]:
        import torch

        values = torch.from_numpy(self.data[part]["pixels"][chosen]).permute(0, 3, 1, 2)
        if part == "train":
            flipped = torch.rand(len(chosen), 1, 1, 1, generator=self.random) < self.flip
            values = torch.where(flipped, values.flip(3), values)
        pixels = (values.float() / 255 - self.mean) / self.std
        return {"pixel_values": pixels, "labels": torch.from_numpy(self.data[part]["classes"][chosen]).long()}

    def train(self, steps: int) -> int:
        """Takes so many steps; an image counts as the tokens that it has in the model."""
        images = 0
        for _ in range(steps):
            batch = next(self.batches)
            images += len(batch["labels"])
            loss = self.model(**{k: v.to(self.device, non_blocking=True) for k, v in batch.items()}).loss
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.loss = float(loss.detach())
        return images * self.tokens

    def accuracy(self) -> float:
        """Share of the held-out images that are named right."""
        import torch

        self.model.eval()
        classes, right = self.data["held_out"]["classes"], 0
        with torch.no_grad():
            for chosen in np.array_split(np.arange(len(classes)), -(-len(classes) // 16)):
                batch = self._batch("held_out", chosen)
                logits = self.model(batch["pixel_values"].to(self.device)).logits
                right += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
        return right / len(classes)


def accuracies(side: str, case: Recipe, folder: Path, seeds: int) -> list[float]:
    """Held-out accuracy after the whole recipe, by seed."""
    steps = case.config["training"]["steps"]
    if side == "lora-jax":
        import lora_jax

        values = case.full_config(steps) | {"tracking": {"dir": str(folder / "runs"), "save": "none", "tensorboard": False}}
        found = lora_jax.sweep(lora_jax.Config.model_validate(values), {"training.seed": list(range(seeds))})
        return [float(member.final["accuracy"]) for member in found.results]
    reached = []
    for seed in range(seeds):
        member = PeftImages(case, folder, steps, seed)
        member.train(steps)
        reached.append(member.accuracy())
    return reached


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The mean of each side, and the difference with a 95 % interval; the seeds of the two sides have nothing in common."""
    from scipy import stats

    found = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = found.confidence_interval()
    difference = float(np.mean(ours) - np.mean(theirs))
    return {"lora-jax": ours, "peft": theirs, "difference": round(difference, 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a DINOv2 checkpoint")
    parser.add_argument("--images", required=True, help="folder with train/ and val/")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a round")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each side")
    parser.add_argument("--seeds", type=int, default=3, help="of the accuracies; 0: only speed and memory")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of our side's config")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "vision_vs_peft_cpu.json")
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = recipe(options.model, options.images, options.set)
    if options.side:
        side, folder, *timed = options.side
        if not timed:
            print(json.dumps(accuracies(side, case, Path(folder), options.seeds)))
        else:
            steps, started = timed
            serve(lambda: {"lora-jax": LoraJax, "peft": PeftImages}[side](case, Path(folder), int(steps)), started)
        return
    load = warn_if_busy()
    with tempfile.TemporaryDirectory(prefix="vision_vs_peft-") as folder:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, case, folder).result()
        script = [str(HERE / "vision_vs_peft.py"), "--model", options.model, "--images", options.images, "--seeds", str(options.seeds)]
        script += ["--set", *options.set]
        total = options.steps * (options.rounds + 1) + 1
        arguments = {side: [*script, "--side", side, folder, str(total)] for side in SIDES}
        sides, ratios = alternate("dinov2", arguments, options.steps, options.rounds)
        reached = {}
        for side in SIDES if options.seeds else ():
            command = [sys.executable, *script, "--side", side, folder]
            done = subprocess.run(command, env=side_environment(), stdout=subprocess.PIPE, text=True, check=True)
            reached[side] = json.loads(done.stdout.splitlines()[-1])
        tokens = int(np.load(Path(folder) / "train.npz")["tokens"])
    for side in SIDES:
        sides[side]["images_per_second"] = round(sides[side]["tokens_per_second"] / tokens, 2)
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/vision_vs_peft.py", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name({"dinov2": sides}),
        "python": platform.python_version(),
        "load_average": round(load, 2),
        **sides,
        "ratios": ratios,
        "targets": TARGETS,
        "accuracy": compared(*(reached[side] for side in SIDES)) if reached else None,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({key: report[key] for key in ("ratios", "accuracy")}, indent=1))


if __name__ == "__main__":
    main()
