"""Does an adapter of low rank suffice when a trained policy meets other physics?

    python experiments/rl_adapt.py                                    # CartPole, then SpaceInvaders of MinAtar
    python experiments/rl_adapt.py --environments CartPole-v1 --seeds 2
    python experiments/rl_adapt.py --pretrain-only                    # only the policies, for configs/ppo_cartpole.yaml

A policy is trained in an environment by PPO, saved and frozen. Then the environment's physics change, in several ways, and for each:

- LoRA on its linear layers (convolutions stay as they are) at ranks 1, 2, 4 and 8, with 8 seeds: one pack of 32 members;
- full fine-tuning, its two heads alone, and full training of a new policy: 8 seeds each.

All make the same number of steps in the same number of environments, and each has the better of two learning rates, by its mean over seeds
in the first of the changed environments (LoRA over all its ranks). Returns are means over the episodes of an evaluation, which are the same
for all; intervals are 95 % over seeds (Student's t). The rank that is reported beside full fine-tuning is the best one by the same
evaluation, which flatters it a little; all ranks are in the JSON. The time of a training step of the pack of 32 is measured against one
member's, in turn, as medians.

Needs: pip install 'lora-jax[rl]'. Figures are in results/rl_adapt.json and figures/rl_adapt.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.adapters.merge import merged_base
from lora_jax.analysis import Estimate
from lora_jax.models.families.actor_critic import save_policy
from lora_jax.models.policy import Policy, PolicyConfig
from lora_jax.packing.execution import VMAP, configured_mode
from lora_jax.packing.pack import Pack
from lora_jax.tracking.rundir import describe_environment
from lora_jax.training.loop import Outcome, train_pack
from lora_jax.training.setup import Preparer

HERE = Path(__file__).parent
RANKS, RATES, METRIC = (1, 2, 4, 8), (3e-3, 1e-2), "episode_return"


@dataclasses.dataclass(frozen=True)
class Setting:
    """An environment, its policy, its changed physics, and how long is trained.

    Attributes:
        common: physics in force before and after the change.
        steps: (of the first training, of each adaptation) training steps.
    """

    policy: PolicyConfig
    changes: dict[str, dict[str, float]]
    task: dict[str, Any]
    steps: tuple[int, int]
    common: dict[str, float] = dataclasses.field(default_factory=dict)


# One body serves both heads, and returns of hundreds have large errors: the values' share of the gradient is kept small.
PPO = {"kind": "ppo", "environments": 8, "rollout": 64, "update_epochs": 4, "minibatches": 4, "value": 0.01}
SETTINGS = {
    "CartPole-v1": Setting(
        PolicyConfig((4,), 2, (64, 64)),
        {
            "motor reversed": {"force_mag": -10.0},
            "long heavy pole": {"length": 2.0, "masspole": 1.0, "total_mass": 2.0, "polemass_length": 2.0},
            "weak motor, strong gravity": {"force_mag": 4.0, "gravity": 20.0},
        },
        PPO | {"eval_episodes": 16},
        (160, 64),
    ),
    "SpaceInvaders-MinAtar": Setting(
        PolicyConfig((10, 10, 6), 4, (64,), (8,), "relu"),
        {
            "enemies three times as fast": {"enemy_move_interval": 4, "enemy_shot_interval": 7},
        },
        PPO | {"eval_episodes": 16, "update_epochs": 2, "value": 0.25},
        (300, 32),
        {"max_steps_in_episode": 300},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs=2, help="training steps: of the first training, and of each adaptation")
    parser.add_argument("--pretrain-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/rl_adapt"), help="folder for the policies")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "rl_adapt.json")
    parser.add_argument("--figure", type=Path, default=HERE / "figures" / "rl_adapt.png")
    args = parser.parse_args()
    # Learning rates are data: members that differ in them alone share their programs.
    jax.config.update("jax_compilation_cache_dir", str((args.work / "xla").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    found: dict[str, Any] = {"seeds": args.seeds, "ranks": list(RANKS), "environment": describe_environment(), "environments": {}}
    for name in args.environments:
        setting = SETTINGS[name]
        if args.steps:
            setting = dataclasses.replace(setting, steps=tuple(args.steps))
        base, fresh, returned = pretrain(name, setting, args.work / name)
        print(f"{name}: trained policy {returned:.1f}", flush=True)
        if args.pretrain_only:
            continue
        found["environments"][name] = adapt(name, setting, base, fresh, args.seeds) | {"trained": returned}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")  # after each: what is done is kept
    if not args.pretrain_only:
        draw(found, args.figure)


def config_of(name: str, setting: Setting, source: Path, physics: dict[str, float], steps: int, rate: float, **adapter: Any) -> Any:
    return lora_jax.Config.model_validate(
        {
            "name": "rl_adapt",
            "model": {"source": str(source)},
            "task": setting.task | {"environment": name, "physics": setting.common | physics},
            "adapter": adapter,
            "optimizer": {"learning_rate": rate, "clip_norm": 0.5, "eps": 1e-5},
            "training": {"steps": steps},
        }
    )


def with_seed(config: Any, seed: int) -> Any:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def train(prepare: Preparer, configs: list[Any], every: int) -> tuple[list[int], np.ndarray, Outcome, Pack]:
    """(training steps, returns there (evaluations, members), outcome, pack) of members of one pack."""
    setup = prepare(configs[0])
    mode, specs = configured_mode(configs[0]) or VMAP, [setup.spec(c) for c in configs]
    pack = Pack.build(setup.model, configs, setup.steps, setup.mesh, mode, specs=specs, layout=setup.layout(configs))
    curve: dict[int, np.ndarray] = {}
    quiet = {name: lambda *_: None for name in ("on_start", "on_save", "on_train", "on_texts")}
    listener: Any = types.SimpleNamespace(**quiet, on_eval=lambda step, metrics: curve.update({step: metrics[METRIC]}))
    outcome = train_pack(pack, setup, eval_every=every, log_every=10**9, listener=listener)
    return list(curve), np.stack(list(curve.values())), outcome, pack


def pretrain(name: str, setting: Setting, folder: Path) -> tuple[Path, Path, float]:
    """The folders of the trained policy and of a new one, and the return of the former in the environment that it was trained in."""
    fresh, base, steps = folder / "fresh", folder / "base", setting.steps[0]
    save_policy(Policy(setting.policy, rngs=nnx.Rngs(0)), fresh)
    config = config_of(name, setting, fresh, {}, steps, 3e-3, method="full")
    curve, returns, outcome, pack = train(Preparer(), [config], max(1, steps // 10))
    print(f"{name}: {dict(zip(curve, returns[:, 0].round(1).tolist(), strict=True))}", flush=True)
    arrays = {n: a[0] for n, a in outcome.best_arrays.items()}
    settings = {n: a[0] for n, a in pack.fixed.settings.items()}
    save_policy(merged_base(pack.part.merge(arrays, settings, pack.part.frozen, training=False)), base)
    return base, fresh, float(outcome.best[METRIC][0])


def adapt(name: str, setting: Setting, base: Path, fresh: Path, seeds: int) -> dict[str, Any]:
    """All ways of adapting to all changes of an environment, and what a step of the pack takes."""
    steps, prepare = setting.steps[1], Preparer()
    targets = [n for n in setting.policy.layers]
    ways: dict[str, tuple[Path, list[tuple[str, dict[str, Any]]]]] = {
        "LoRA": (base, [(f"LoRA r={r}", {"rank": r, "alpha": 2.0 * r, "targets": targets}) for r in RANKS]),
        "full": (base, [("full fine-tuning", {"method": "full"})]),
        "heads": (base, [("heads alone", {"method": "head", "modules_to_save": ["actor", "critic"]})]),
        "scratch": (fresh, [("from scratch", {"method": "full"})]),
    }
    rates: dict[str, float] = {}
    found: dict[str, Any] = {
        "steps": steps,
        "environment_steps": steps * setting.task["environments"] * setting.task["rollout"],
        "changes": {},
    }
    for change, physics in setting.changes.items():
        rows: dict[str, Any] = {}
        for way, (source, members) in ways.items():
            tried: dict[float, tuple[list[int], np.ndarray]] = {}
            for rate in RATES if way not in rates else (rates[way],):
                kinds = [config_of(name, setting, source, physics, steps, rate, **adapter) for _, adapter in members]
                configs = [with_seed(kind, seed) for kind in kinds for seed in range(seeds)]
                began = time.perf_counter()
                curve, returns, _, pack = train(prepare, configs, max(1, steps // 8))
                seconds = time.perf_counter() - began
                tried[rate] = curve, returns
                print(f"{name}, {change}, {way}, rate {rate:g}: {returns[-1].mean():.1f} ({seconds:.0f} s)", flush=True)
                if way == "LoRA" and "step_seconds" not in found:
                    found["step_seconds"] = step_times(prepare, configs)
            rates.setdefault(way, max(tried, key=lambda rate: float(tried[rate][1][-1].mean())))
            curve, returns = tried[rates[way]]
            for number, (label, _) in enumerate(members):
                own = returns[:, number * seeds : (number + 1) * seeds]
                estimates = [Estimate.of(row.tolist()) for row in own]
                rows[label] = {
                    "learning_rate": rates[way],
                    "parameters": pack.parameter_count(number * seeds),
                    "steps": curve,
                    "mean": [round(e.mean, 2) for e in estimates],
                    "half_width": [None if e.half_width is None else round(e.half_width, 2) for e in estimates],
                    "final": own[-1].round(2).tolist(),
                }
        before = unadapted(prepare, config_of(name, setting, base, physics, 1, 1e-3, targets=targets))
        full = rows["full fine-tuning"]["mean"][-1]
        best = max((label for label in rows if label.startswith("LoRA")), key=lambda label: rows[label]["mean"][-1])
        share = rows[best]["mean"][-1] / full
        print(f"{name}, {change}: unadapted {before:.1f}, full {full:.1f}, {best} at {100 * share:.0f} % of it", flush=True)
        found["changes"][change] = {
            "physics": physics,
            "unadapted": before,
            "best_lora": best,
            "share_of_full": round(share, 3),
            "ways": rows,
        }
    return found


def unadapted(prepare: Preparer, config: Any) -> float:
    """The return of the policy as it is, in an environment."""
    setup = prepare(config)
    pack = Pack.build(setup.model, [config], setup.steps, setup.mesh)
    inputs = setup.held_out_inputs(setup.plan.eval_batches()[0], None)
    returns = pack.programs.evaluate(pack.state.trainable, pack.fixed.settings, pack.part.frozen, inputs)[3]
    return float(np.asarray(returns).mean())


def step_times(prepare: Preparer, configs: list[Any], rounds: int = 7) -> dict[str, Any]:
    """Medians of a training step of all members and of one member, in turn; the first of each, which compiles, is left out."""
    setup = prepare(configs[0])
    sides = {len(own): Pack.build(setup.model, own, setup.steps, setup.mesh) for own in (configs, configs[-1:])}
    states, times = {n: pack.state for n, pack in sides.items()}, {n: [] for n in sides}
    inputs = setup.step_inputs(0, setup.plan.batch(0), None)
    for step in range(rounds + 1):
        for count, pack in sides.items():
            began = time.perf_counter()
            states[count], metrics = pack.programs.train(states[count], pack.fixed, pack.part.frozen, inputs, np.int32(step))
            jax.block_until_ready(metrics)
            times[count].append(time.perf_counter() - began)
    medians = {str(count): round(float(np.median(own[1:])), 4) for count, own in times.items()}
    return medians | {"ratio": round(medians[str(len(configs))] / medians["1"], 2)}


def draw(found: dict[str, Any], path: Path) -> None:
    """Curves with intervals, a panel for each change."""
    panels = [(name, change, of) for name, env in found["environments"].items() for change, of in env["changes"].items()]
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    lines = []
    for axes, (name, change, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ranks = 0
        for label, way in of["ways"].items():
            lora = label.startswith("LoRA")
            colour = f"C{ranks}" if lora else {"full fine-tuning": "black", "heads alone": "0.55", "from scratch": "C4"}[label]
            ranks += lora
            steps, mean, half = (np.array(way[key], float) for key in ("steps", "mean", "half_width"))
            lines.append(axes.plot(steps, mean, color=colour, ls="-" if lora else "--", label=label)[0])
            axes.fill_between(steps, mean - np.nan_to_num(half), mean + np.nan_to_num(half), color=colour, alpha=0.12, lw=0)
        axes.axhline(of["unadapted"], color="0.7", lw=0.8, ls=":")
        axes.set(title=f"{name}\n{change}", xlabel="training step", ylabel="return")
        axes.title.set_fontsize(9)
    shown = {line.get_label(): line for line in lines}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
