"""What comes of damaged configs, adapters and data files: the first three parts of `experiments/fuzz.py`.

Every case has a random generator of its own, from the seed, the part and its number.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import copy
import gc
import gzip
import io
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Counts = dict[str, Any]


class TooLong(BaseException):
    """A case took longer than its limit. No `Exception`, so that nothing handles it as a failure of the input."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what runs inside after so many seconds."""

    def late(*_: Any) -> None:
        raise TooLong(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tally(part: str, count: int, seconds: float, case: Callable[[np.random.Generator], str], seed: int) -> Counts:
    """Tries `count` cases.

    Args:
        part: its name, for the console and the seeds.
        count: how many.
        seconds: each may take.
        case: makes one of random numbers and tries it; returns in a word how it went, or raises.

    Returns:
        word -> how often, `refused` among them; `faults`, one line each; `slowest` in seconds.
    """
    from lora_jax.errors import InputError

    counts: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    slowest, began = 0.0, time.monotonic()
    for number in range(count):
        started = time.monotonic()
        rng = np.random.default_rng([seed, sum(map(ord, part)), number])
        try:
            with within(seconds), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counts[case(rng)] += 1
        except InputError as error:
            counts["refused"] += 1
            if not 0 < len(str(error)) < 4000:
                faults.append(f"{part} {number}: a message of {len(str(error))} characters")
        except (Exception, TooLong) as error:
            faults.append(f"{part} {number}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
        slowest = max(slowest, time.monotonic() - started)
        if number % 50 == 49 or number == count - 1:
            print(f"{part}: {number + 1} of {count}, {len(faults)} faults, {time.monotonic() - began:.0f} s", file=sys.stderr)
            collect_garbage()
    return {"tried": count, **sorted_counts(counts), "slowest": round(slowest, 1), "faults": faults}


def sorted_counts(counts: collections.Counter[str]) -> Counts:
    """A counter as a dict, in the order of its words."""
    return {word: counts[word] for word in sorted(counts)}


def collect_garbage() -> None:
    """Compiled programs and traces of cases that are over."""
    import jax

    jax.clear_caches()
    gc.collect()


def pick(rng: np.random.Generator, choices: Any) -> Any:
    """One of them."""
    return choices[int(rng.integers(len(choices)))]


# Configs

NESTED: Any = "x"
for _ in range(60):
    NESTED = [NESTED]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 4, 7, 16, 48, 0.5, 0.1, 1e-3, 1.0, 8.0, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**12, 10**30,
    10**400, 1e-320, 1e30, 1e308, -1e308,
    math.inf, -math.inf, math.nan, "", " ", "\0", "\ud800", "\u202egrad", "é\u0301", "🙂" * 9, "ﬁ", "x" * 300, "x" * 100_000, "8", "1e3",
    "0x10", "yes", "null", "2020-01-01", "..", "/", "/dev/null", "../../x", "hf://", "hf://a/b", "package://os/x", "package://", "[INST]",
    "{text", "{text}{0}", "{text.__class__}", "{{ text }}", "(", "*", "((a{99}){99}){99}", "(a|a)*b", "last:2", "first:1",
    "all", "mlp", "attention", "all-linear", "0-999999999999", "q_proj",
    "rank", [], {}, [[]], [None], [[1, 2], [3]], NESTED, {"a": {"b": 1}}, {"": 1}, ["q_proj", 3], ["q_proj"] * 300, [1, 2], ["x", "y"],
    {"choice": [1, 2]}, {"uniform": [1, 8]}, {"log_uniform": [0, 1]}, {"adapter.rank": [1, 2]}, list(range(1, 300)),
]  # fmt: skip
Place = tuple[Any, Any]  # a mapping or list, and a key or index in it


def places(node: Any) -> list[Place]:
    """Everything in nested mappings and lists, by where it stands."""
    inside = list(node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(node, dict | list) else []
    return [(node, key) for key, _ in inside] + [place for _, value in inside for place in places(value)]


def fitting(key: str) -> list[Any]:
    """Odd values of a kind that a config key may have; all of its choices where it has choices."""
    from lora_jax.config.messages import leaf_schema

    schema = leaf_schema(key) or {}
    forms = [schema, *schema.get("anyOf", [])]
    choices = [choice for form in forms for choice in form.get("enum", [])]
    kinds = {"integer": int, "number": int | float, "string": str, "boolean": bool, "array": list, "object": dict}
    wanted = [kinds[form["type"]] for form in forms if form.get("type") in kinds]
    return choices or [value for value in ODD if isinstance(value, tuple(wanted))] or ODD


def mutated(values: dict[str, Any], keys: list[str], rng: np.random.Generator) -> dict[str, Any]:
    """A config with one change: another value, a key too many or too few, another nesting, other characters.

    Args:
        values: the config; unchanged.
        keys: dotted keys of the schema.
    """
    values = copy.deepcopy(values)
    at, key = pick(rng, places(values))
    how = int(rng.integers(10))
    if how == 0:
        at[key] = pick(rng, ODD)
    elif how <= 5:
        here, words = values, pick(rng, keys).split(".")
        for word in words[:-1]:
            here[word] = here.get(word) if isinstance(here.get(word), dict) else {}
            here = here[word]
        here[words[-1]] = pick(rng, fitting(".".join(words)) if rng.integers(8) else ODD)
    elif how == 6 and isinstance(at, dict):
        spelled = [*str(key)]
        spelled[int(rng.integers(len(spelled)))] = pick(rng, ["", "x", "_", "\u00e9", "\u200b", ".", " "])
        at["".join(spelled)] = at.pop(key) if rng.integers(2) else at[key]
    elif how == 7:
        del at[key]
    elif how == 8:
        at[key] = pick(rng, [lambda v: [v], lambda v: [[v]], lambda v: {"a": v}, lambda v: [v, v], lambda v: str(v) + "\u0000x"])(at[key])
    else:
        other, name = pick(rng, places(values))
        at[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(at[key])
    return values


def mutated_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes cut short, flipped, inserted, taken out, written over or repeated."""
    if not data:
        return rng.bytes(20)
    a, b = sorted(int(n) for n in rng.integers(0, len(data) + 1, 2))
    how = int(rng.integers(7))
    if how == 0:
        return data[:a]
    if how <= 2:
        flipped = bytearray(data)
        for place in rng.integers(0, len(data), int(rng.integers(1, 12))):
            flipped[place] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    noise = pick(
        rng, [rng.bytes(int(rng.integers(1, 40))), b"\0", b'"', b"\n", b"\r", b"\t", b",", b"{", b"[" * 3000, b"\xff\xfe", b"\xed\xa0\x80"]
    )
    if how == 3:
        return data[:a] + noise + data[a:]
    if how == 4:
        return data[:a] + data[b:]
    return data[:a] + noise + data[a + len(noise) :] if how == 5 else data[:b] + data[a:b] + data[b:]


def fuzz_configs(folder: Path, count: int, seed: int) -> Counts:
    """Mutated configs, loaded and planned: their members, their packs, all that is checked before anything trains."""
    from lora_jax.config.load import load_config
    from lora_jax.config.messages import kinds_of_sections, valid_keys
    from lora_jax.packing.planner import Planner
    from lora_jax.sweeps.plan import largest_pack
    from lora_jax.sweeps.space import members_of
    from lora_jax.training.setup import Preparer
    from tests.tiny_hub import write_hub

    hub, keys, kinds, prepare = write_hub(folder / "hub"), valid_keys(), kinds_of_sections(), Preparer(weights=False)
    chat = {"kind": "causal_lm", "source": str(hub.questions), "messages": "messages", "eval_size": 20, "max_length": 24}
    grid = {"grid": {"adapter.rank": [1, 3], "training.seed": [0, 1]}, "where": "rank < 4"}
    drawn = {"random": {"count": 3, "keys": {"optimizer.learning_rate": {"log_uniform": [0.001, 0.1]}}}, "seeds": 2}
    originals = [
        hub.values() | {"sweep": grid},
        hub.values() | {"sweep": drawn},
        hub.values(causal=True) | {"sweep": {"zip": {"adapter.rank": [1, 2], "adapter.alpha": [4, 8]}}},
        hub.values(causal=True) | {"task": chat, "sweep": {"members": [{"adapter.rank": 2}, {"adapter.targets": "mlp"}]}},
        hub.values() | {"task": hub.tagging()},
        hub.values() | {"task": hub.answering(), "sweep": {"grid": {"adapter.rank": [1, 2, 4, 8]}, "halving": {"factor": 2, "rungs": 2}}},
    ]

    def plan(text: bytes) -> str:
        path = folder / "mutated.yaml"
        path.write_bytes(text)
        config = load_config(path)
        members = members_of(config)
        Planner(config, prepare, largest=largest_pack(config, solo=False)).packs(members)
        return "planned"

    for values in originals:
        plan(yaml.safe_dump(values).encode())

    def case(rng: np.random.Generator) -> str:
        values = pick(rng, originals)
        own = kinds["task"][values["task"]["kind"]]
        known = [key for key in keys if not key.startswith("task.") or key.split(".")[1] in own]
        for _ in range(pick(rng, [1, 1, 2, 3])):
            values = mutated(values, known, rng)
        text = yaml.safe_dump(values, sort_keys=False).encode("utf-8", "surrogatepass")
        return plan(text if rng.integers(8) else mutated_bytes(text, rng))

    return tally("configs", count, 60.0, case, seed)


# Adapters


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """Every array of a model, by its path."""
    from flax import nnx

    state = nnx.split(model, graph=True)[1]
    return {".".join(map(str, path)): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def fuzz_flips(folder: Path, count: int, seed: int) -> Counts:
    """A bit of a saved adapter, flipped: half of them of a sweep's member, half of an adapter in PEFT's format."""
    from flax import nnx

    from lora_jax import load_model, load_peft, save_peft
    from lora_jax.models.heads import add_head
    from lora_jax.sweeps.restore import adapter_folder_of, restore_member, run_members
    from lora_jax.sweeps.run import run_sweep
    from tests.tiny_hub import write_hub

    hub = write_hub(folder / "hub")
    run = run_sweep(hub.config(folder, {"adapter.rank_pattern": {"q_proj": 1}, "training.steps": 3})).path
    member = run_members(run)[0]
    base = add_head(load_model(str(hub.bert)), "classification", rngs=nnx.Rngs(0))
    save_peft(restore_member(run, member).model, folder / "peft")
    loads = {
        adapter_folder_of(run, member): lambda: restore_member(run, member).model,
        folder / "peft": lambda: load_peft(base, folder / "peft"),
    }
    whole = {where: arrays_of(load()) for where, load in loads.items()}

    def case(rng: np.random.Generator) -> str:
        where = pick(rng, list(loads))
        file = pick(rng, sorted(p for p in where.rglob("*") if p.is_file() and p.stat().st_size))
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        try:
            loaded = arrays_of(loads[where]())
        finally:
            file.write_bytes(data)
        same = loaded.keys() == whole[where].keys() and all(np.array_equal(loaded[n], a) for n, a in whole[where].items())
        if not same:
            raise ValueError(f"other numbers were loaded ({file.relative_to(where)})")
        return "the same numbers"

    return tally("flips", count, 60.0, case, seed)


# Data files


def written(kind: str) -> bytes:
    """A data file of 80 rows with `text` and `label`, of a kind."""
    rng = np.random.default_rng(0)
    texts = [f'{" ".join(pick(rng, ["good", "bad", "plot", "film", "été", "日本"]) for _ in range(6))}, "{i}"' for i in range(80)]
    rows = [{"text": text, "label": str(i % 2)} for i, text in enumerate(texts)]
    quoted = [('"' + text.replace('"', '""') + '"', row["label"]) for text, row in zip(texts, rows)]
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False).encode()
    parts = {
        "csv": ["text,label", *(",".join(row) for row in quoted)],
        "tsv": ["text\tlabel", *("\t".join(row) for row in quoted)],
        "jsonl": [json.dumps(row, ensure_ascii=False) for row in rows],
        "txt": texts,
    }
    return ("\n".join(parts[kind]) + "\n").encode()


def fuzz_files(folder: Path, count: int, seed: int) -> Counts:
    """Damaged data files, read and made into examples."""
    from lora_jax.tasks.base import task_section
    from lora_jax.tasks.prepare import prepare
    from lora_jax.weights.tokenizer import load_tokenizer
    from tests.tiny_hub import write_hub

    hub = write_hub(folder / "hub")
    tokenizers = {decoder: load_tokenizer(str(hub.llama if decoder else hub.bert)) for decoder in (False, True)}
    kinds = ("csv", "tsv", "jsonl", "parquet", "txt", "json")
    originals = {kind: written(kind) for kind in kinds}
    encodings = ("utf-16", "utf-32", "latin-1", "cp1252", "utf-7", "shift_jis", "utf-8-sig", "utf-16-le")
    packers: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}

    def read(kind: str, data: bytes, packed: str = "") -> str:
        path, decoder = folder / f"damaged.{kind}{packed}", kind == "txt"
        path.write_bytes(data)
        columns = {"kind": "causal_lm", "text": "text"} if decoder else {"kind": "classification", "text": "text", "label": "label"}
        section = task_section(source=str(path), eval_size=10, max_length=24, **columns)
        found = prepare(section, tokenizers[decoder], decoder=decoder)
        return "read" if len(found.train.tokens) else "empty"

    for kind, data in originals.items():
        read(kind, data)

    def case(rng: np.random.Generator) -> str:
        kind, packed = pick(rng, kinds), pick(rng, ["", "", "", "", ".gz", ".bz2"])
        data = originals[kind]
        if kind != "parquet" and rng.integers(4) == 0:
            data = data.decode().encode(pick(rng, encodings), "replace")
        elif packed == "" or rng.integers(2):
            for _ in range(int(rng.integers(1, 4))):
                data = mutated_bytes(data, rng)
        data = packers[packed](data)
        if packed and rng.integers(2):
            data = mutated_bytes(data, rng)
        return read(kind, data, packed)

    return tally("files", count, 10.0, case, seed)
