"""Three hundred damaged adapter folders: each is refused with a message that names its file, in good time, and none is loaded wrongly.

No PyTorch is needed for it. Every case has a seed of its own, so that a failure can be had again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lora_jax import InputError, LoraConfig, inject, load_model, load_peft, save_peft
from lora_jax.models.add_head import add_head
from tests import tiny

CASES = 300
SECONDS = 5.0  # of computing, within which each ends

Damage = Callable[[Path, np.random.Generator], object]
DAMAGES: dict[str, Damage] = {}


def damage(function: Damage) -> Damage:
    DAMAGES[function.__name__] = function  # pyright: ignore[reportFunctionMemberAccess]
    return function


def pick(rng: np.random.Generator, *choices: Any) -> Any:
    return choices[rng.integers(len(choices))]


def config_with(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def retensor(folder: Path, change: Callable[[dict[str, np.ndarray], str], object], rng: np.random.Generator) -> None:
    """Changes one tensor, drawn."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, pick(rng, *sorted(tensors)))
    save_file(tensors, path)


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(folder: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)


def reheader(folder: Path, rng: np.random.Generator, **values: Any) -> None:
    """Changes what the header says of one tensor."""
    header, body = header_of(folder)
    header[pick(rng, *sorted(k for k in header if k != "__metadata__"))].update(values)
    write_header(folder, header, body)


@damage
def a_tensor_is_missing(folder, rng):
    retensor(folder, lambda tensors, key: tensors.pop(key), rng)


@damage
def a_tensor_is_too_many(folder, rng):
    retensor(folder, lambda tensors, key: tensors.update({key.replace("1", "7") + pick(rng, "1", "2", ".weight"): tensors[key]}), rng)


@damage
def a_tensor_has_another_name(folder, rng):
    at = rng.integers(20)
    retensor(folder, lambda tensors, key: tensors.update({key[:at] + "~" + key[at + 1 :]: tensors.pop(key)}), rng)


@damage
def a_tensor_has_another_shape(folder, rng):
    changes = (lambda a: a.reshape(-1), lambda a: a[None], lambda a: a[..., :-1], lambda a: np.concatenate([a, a]), lambda a: a[:0])
    retensor(folder, lambda tensors, key: tensors.update({key: np.ascontiguousarray(pick(rng, *changes)(tensors[key]))}), rng)


@damage
def a_tensor_has_another_dtype(folder, rng):
    kind = pick(rng, np.int32, np.int8, np.bool_, np.uint64)
    retensor(folder, lambda tensors, key: tensors.update({key: tensors[key].astype(kind)}), rng)


@damage
def a_number_is_not_finite(folder, rng):
    def change(tensors, key):
        tensors[key] = tensors[key].copy()
        tensors[key].flat[rng.integers(tensors[key].size)] = pick(rng, np.nan, np.inf, -np.inf)

    retensor(folder, change, rng)


@damage
def a_file_is_cut_short(folder, rng):
    path = folder / pick(rng, "adapter_config.json", "adapter_model.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: rng.integers(len(data))])


@damage
def a_file_goes_on(folder, rng):
    path = folder / pick(rng, "adapter_config.json", "adapter_model.safetensors")
    path.write_bytes(path.read_bytes() + pick(rng, b"\0", b"{", b"x" * 999))


@damage
def a_file_is_noise(folder, rng):
    (folder / pick(rng, "adapter_config.json", "adapter_model.safetensors")).write_bytes(rng.bytes(int(rng.integers(1, 5000))))


@damage
def a_file_is_no_file(folder, rng):
    path = folder / pick(rng, "adapter_config.json", "adapter_model.safetensors")
    path.unlink()
    pick(rng, lambda: None, path.mkdir, lambda: path.symlink_to(path.name), (folder / "adapter_model.bin").touch)()


@damage
def a_header_has_an_absurd_length(folder, rng):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        pick(rng, 0, 1, 2, len(data), 2**31, 2**40, 2**63, 2**64 - 1, int(rng.integers(3, 400))).to_bytes(8, "little") + data[8:]
    )


@damage
def a_header_is_no_header(folder, rng):
    deep = b"[" * 100_000 + b"]" * 100_000
    write_header(
        folder, pick(rng, b"[]", b"7", b"null", b'{"a": 1}', b"{}", deep, b"\xff\xfe", b'{"a": {}}', b"9" * 5000), header_of(folder)[1]
    )


@damage
def a_header_says_nonsense(folder, rng):
    reheader(
        folder,
        rng,
        **pick(
            rng,
            {"dtype": "F99"},
            {"dtype": ["F32"]},
            {"dtype": "F64"},
            {"shape": [-2, -2]},
            {"shape": [2**62, 2**62]},
            {"shape": "ab"},
            {"shape": [True, 4]},
            {"shape": [[4], 4]},
            {"data_offsets": [0]},
            {"data_offsets": [-4, 4]},
            {"data_offsets": [0, 2**63]},
            {"data_offsets": {"0": 1}},
            {"data_offsets": [0.0, 64.0]},
        ),
    )


@damage
def tensors_overlap(folder, rng):
    """Two keys with the same bytes: one of them is not what was saved."""
    header, body = header_of(folder)
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, entry in header.items():
        if key != "__metadata__":
            by_shape.setdefault(tuple(entry["shape"]), []).append(key)
    keys = pick(rng, *[k for k in by_shape.values() if len(k) > 1])
    header[keys[0]]["data_offsets"] = header[keys[1]]["data_offsets"]
    write_header(folder, header, body)


@damage
def a_key_stands_twice(folder, rng):
    if rng.integers(2):
        header, body = header_of(folder)
        key = pick(rng, *sorted(k for k in header if k != "__metadata__"))
        text = json.dumps(header)
        write_header(folder, (text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}").encode(), body)
    else:
        path = folder / "adapter_config.json"
        path.write_text(
            path.read_text().rstrip()[:-1] + pick(rng, ', "r": 4}', ', "lora_alpha": 999}', ', "rank_pattern": {"a": 1, "a": 2}}')
        )


@damage
def a_rank_is_absurd(folder, rng):
    config_with(folder, r=pick(rng, 0, -1, 3, 5, 10**6, 10**12, 10**400, 1.5, "4", None, True, [4], {}, 1e308))


@damage
def an_alpha_is_absurd(folder, rng):
    config_with(folder, lora_alpha=pick(rng, float("nan"), float("inf"), -float("inf"), 0, -8, "16", None, True, [16], 10**400, 1e-320))


@damage
def a_pattern_is_absurd(folder, rng):
    numbers = [{"query": number} for number in (0, -1, "4", None, float("nan"), 10**400, True)]
    config_with(folder, **{pick(rng, "rank_pattern", "alpha_pattern"): pick(rng, [{"query": 4}], "query", 7, {"(": 4}, {"*": 4}, *numbers)})


@damage
def a_pattern_gives_other_ranks(folder, rng):
    config_with(folder, rank_pattern={pick(rng, "query", r".*\.1\..*", "value", ".*"): int(pick(rng, 1, 3, 5, 4096, 10**9))})


@damage
def a_pattern_never_ends(folder, rng):
    endless = pick(rng, r"(.|.)*\d(.|.)*\d(.|.)*\d", r"((.|.)+)+(?<=z)", r"(.|\w)*(?<=\d\d)", r"(.|\w)*\d{2}")
    config_with(folder, **pick(rng, {"target_modules": endless}, {"exclude_modules": endless}, {"rank_pattern": {endless: 2}}))


@damage
def targets_are_absurd(folder, rng):
    others = (["query"], ["query", "value", "key"], "all-linear", ["qwery"], "qwery", "x" * 100_000)
    config_with(folder, target_modules=pick(rng, None, [], {}, "", 7, [1], [None], [""], [["query"]], "(", "(?P<a>x)(?P<a>y)", *others))


@damage
def layers_are_absurd(folder, rng):
    config_with(folder, layers_to_transform=pick(rng, -1, [-1], [99], "1", [1.5], [True], {"1": 2}, [10**30], [0], [[1]]))


@damage
def an_option_has_a_wrong_type(folder, rng):
    wrong = {
        "lora_dropout": (1.0, float("nan"), "0"),
        "bias": ("some", 1, ["none"]),
        "use_rslora": ("yes", 1),
        "modules_to_save": ("pooler", [1], ["("]),
        "init_lora_weights": (7,),
        "fan_in_fan_out": ("no",),
        "layers_pattern": (5, ["("]),
        "exclude_modules": (5, "("),
    }
    key = pick(rng, *wrong)
    config_with(folder, **{key: pick(rng, *wrong[key])})


@damage
def an_option_asks_for_more(folder, rng):
    config_with(folder, **pick(rng, {"use_dora": True}, {"lora_bias": True}, {"use_qalora": True}, {"alora_invocation_tokens": [1]},
                               {"layer_replication": [[0, 2]]}, {"trainable_token_indices": [1]}, {"megatron_config": {"a": 1}},
                               {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}, {"bias": "lora_only"},
                               {"target_parameters": ["mlp.experts"]}, {"modules_to_save": ["pooler"]}, {"use_magic": 1},
                               {"rank_paterns": {"a": 1}}, {"kasa_config": {"a": 1}}, {"ensure_weight_tying": True}))  # fmt: skip


@damage
def it_is_another_kind(folder, rng):
    config_with(folder, peft_type=pick(rng, "LOHA", "ADALORA", "lora", None, 7, ["LORA"], {}))


@damage
def a_config_is_no_object(folder, rng):
    deep = "[" * 100_000 + "]" * 100_000
    (folder / "adapter_config.json").write_text(pick(rng, "[]", "7", "null", '"x"', "", deep, "{", '{"r": ' + "9" * 10_000 + "}", "{}"))


@damage
def an_index_leads_astray(folder, rng):
    keys = list(load_file(folder / "adapter_model.safetensors"))
    (folder / "shard.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    shutil.copy(folder / "adapter_model.safetensors", folder.parent / "outside.safetensors")
    outside = ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "a/../../outside.safetensors", "..\\outside", "C:x")
    hostile = pick(rng, *outside, "a\0b", "", 7, None, ["shard.safetensors"], "x" * 5000, ".", "adapter_config.json", "gone.safetensors")
    where = {key: "shard.safetensors" for key in keys} | {pick(rng, *keys): hostile}
    index = pick(rng, {"weight_map": where}, {"weight_map": where}, {"weight_map": where}, {}, {"weight_map": {}}, {"weight_map": keys}, [])
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def base(hub) -> nnx.Module:
    return add_head(load_model(str(hub.bert)), "classification", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> Path:
    """An adapter with two sites in each of three layers, of two ranks, and the head's weights."""
    config = LoraConfig(rank=4, targets=["query", "value"], rank_pattern={"value": 2})
    folder = tmp_path_factory.mktemp("good") / "adapter"
    save_peft(inject(base, config, rngs=nnx.Rngs(1)), folder)
    return folder


@pytest.fixture(scope="module")
def bare(good) -> Path:
    """The same without digests, as others write it: each kind of damage is then found by what it is."""
    folder = good.with_name("bare")
    shutil.copytree(good, folder)
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


def test_it_is_the_damage_that_is_refused(base, bare, tmp_path):
    save_peft(load_peft(base, bare), tmp_path / "again")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (bare, tmp_path / "again"))
    assert len(first) == 14 and tiny.arrays_equal(first, again)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(base, bare, tmp_path, name, monkeypatch):
    monkeypatch.setattr("lora_jax.config.patterns.TIMEOUT", 0.2)
    kinds = list(DAMAGES)
    seeds = [seed for seed in range(CASES) if kinds[seed % len(kinds)] == name]
    for seed in seeds:
        folder = tmp_path / f"case-{seed}"
        shutil.copytree(bare, folder)
        DAMAGES[name](folder, np.random.default_rng(seed))
        began = time.process_time()
        with pytest.raises(InputError) as told:
            load_peft(base, folder)
            pytest.fail(f"seed {seed} was loaded")
        assert time.process_time() - began < SECONDS, seed
        assert f"case-{seed}" in str(told.value) and len(str(told.value)) < 1500, (seed, str(told.value)[:300])


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_of_a_header_is_refused_or_changes_nothing(base, bare, tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    shutil.copytree(bare, path.parent)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for at in rng.integers(0, end, 5):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            loaded = load_peft(base, path.parent)
        except InputError:
            continue
        save_peft(loaded, tmp_path / f"again-{at}")
        again = load_file(tmp_path / f"again-{at}" / "adapter_model.safetensors")
        assert tiny.arrays_equal(again, load_file(bare / "adapter_model.safetensors")), at


def test_no_flipped_bit_loads_other_numbers(base, good, tmp_path):
    """Of what we write ourselves, wherever the bit is."""
    rng, whole = np.random.default_rng(0), outputs_of(base, good)
    refused = 0
    shutil.copytree(good, tmp_path / "adapter")
    for _ in range(40):
        path = tmp_path / "adapter" / pick(rng, "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors")
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert tiny.arrays_equal(outputs_of(base, path.parent), whole)
        except InputError as error:
            refused += 1
            assert str(path.parent) in str(error)
        path.write_bytes(data)
    assert refused > 25


def outputs_of(base, folder):
    state = nnx.state(load_peft(base, folder))
    return {str(path): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}


def test_an_edited_config_is_refused_by_the_option_and_a_name_may_be_edited(base, good, tmp_path):
    shutil.copytree(good, tmp_path / "adapter")
    config_with(tmp_path / "adapter", base_model_name_or_path="another/name", task_type="SEQ_CLS")
    load_peft(base, tmp_path / "adapter")
    config_with(tmp_path / "adapter", lora_alpha=32, use_rslora=True)
    with pytest.raises(InputError, match=r"adapter_config.json: 'lora_alpha', 'use_rslora' is not as it was .* damaged, or edited"):
        load_peft(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # what the message says
    load_peft(base, tmp_path / "adapter")
