"""What a checkpoint was saved as: quantised layouts, wrappers' prefixes, old names. Applied or refused, and never without a word."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.errors import InputError, InputWarning
from lora_jax.weights.load import open_checkpoint
from lora_jax.weights.safetensors import Tensor, write_safetensors

F8, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
BLOCKS = {"quant_method": "fp8", "weight_block_size": [4, 2]}
GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"group_size": 3}}}}


def written(folder, tensors, config=None):
    """A folder with these tensors (any dtype) and this `quantization_config`."""
    write_safetensors(folder / "model.safetensors", {n: Tensor(v.shape, v.dtype, lambda v=v: v) for n, v in tensors.items()})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | ({"quantization_config": config} if config else {})))
    return folder


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("suffix", "scale", "config", "block"),
    [
        ("_scale", np.float32(0.3), None, (10, 6)),
        ("_scale_inv", np.full((1, 1), 0.3, np.float32), {"quant_method": "fp8"}, (10, 6)),
        ("_scale", weight(10), {"quant_method": "fbgemm_fp8"}, (1, 6)),
        ("_scale", weight(10, 1).astype(BF16), {"quant_method": "compressed-tensors", "format": "float-quantized"}, (1, 6)),
        ("_scale_inv", weight(3, 3), BLOCKS, (4, 2)),
        ("_scale", np.exp2(np.arange(9).reshape(3, 3)).astype(E8M0), BLOCKS, (4, 2)),
        ("_scale", weight(10, 2), GROUPS, (1, 3)),
    ],
)
def test_float8_is_multiplied_by_its_scales(tmp_path, suffix, scale, config, block):
    stored, scale = weight(10, 6).astype(F8), np.asarray(scale)
    with pytest.warns(InputWarning, match="1 float8 weights are multiplied by their scales"):
        checkpoint = open_checkpoint(
            written(tmp_path, {"a.weight": stored, f"a.weight{suffix}": scale, "a.input_scale": np.float32([2])}, config)
        )
    numbers = scale.astype(np.float32)
    numbers = numbers.reshape(10, 1) if numbers.shape == (10,) else numbers
    if numbers.size > 1:
        numbers = np.repeat(np.repeat(numbers, block[0], 0), block[1], 1)[:10, :6]
    expected = stored.astype(np.float32) * numbers
    assert checkpoint.names() == ["a.weight"] and checkpoint.dtype("a.weight") == np.float32
    np.testing.assert_array_equal(checkpoint.read("a.weight"), expected)
    np.testing.assert_array_equal(checkpoint.read_slice("a.weight", (slice(3, 9), slice(1, 4))), expected[3:9, 1:4])
    assert "quantization_config" not in checkpoint.config  # what is written from it is not quantised


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        ({"a.qweight": np.zeros((2, 2), np.int32)}, {"quant_method": "gptq"}, r"'a.qweight' is stored in a quantised .*: gptq"),
        (
            {"a.weight": np.zeros((8, 1), np.uint8)},
            {"quant_method": "bitsandbytes"},
            r"'a.weight' is stored in a quantised .*: bitsandbytes",
        ),
        ({"a.weight": np.zeros((8, 1), np.int8), "a.SCB": weight(8)}, None, r"quantised layout that is not read"),
        (
            {"a.weight_packed": np.zeros((8, 1), np.int32)},
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "pack-quantized",
        ),
        ({"e.down_proj_blocks": np.zeros((8, 1), np.uint8)}, {"quant_method": "mxfp4"}, "mxfp4"),
        ({"a.weight": weight(2, 2).astype(F8)}, {"quant_method": "fp8"}, "'a.weight' is float8 without 'a.weight_scale'"),
        ({"a.weight": weight(2, 2).astype(F8), "a.scale_weight": weight(1)}, None, "'a.scale_weight' is not a scale as known here"),
        ({"a.weight": weight(2, 2), "a.weight_scale": weight(2)}, None, "'a.weight_scale' scales a weight that is float32"),
        ({"a.weight": weight(5, 2).astype(F8), "a.weight_scale": weight(3, 2)}, None, r"'a.weight_scale' has shape \(3, 2\) .* do not fit"),
    ],
)
def test_other_quantised_layouts_are_refused_by_name(tmp_path, tensors, config, said):
    with pytest.raises(InputError, match=said):
        open_checkpoint(written(tmp_path, tensors, config))


def test_a_quantisation_that_was_not_carried_out_is_said(tmp_path):
    with pytest.warns(InputWarning, match=r"quantization_config \(bitsandbytes\) is not used"):
        open_checkpoint(written(tmp_path, {"a.weight": weight(2, 2)}, {"quant_method": "bitsandbytes", "load_in_4bit": True}))
    with pytest.warns(InputWarning, match="1 weights are float8 without scales"):
        open_checkpoint(written(tmp_path, {"a.weight": weight(2, 2).astype(F8)}))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["_orig_mod.norm.weight", "_orig_mod.a.weight"], "torch.compile"),
        (["module._orig_mod.norm.weight", "module._orig_mod.a.weight"], "'module.' .*, '_orig_mod.'"),
        (["base_model.model.norm.weight", "base_model.model.a.weight"], "PEFT"),
        (["norm.weight", "_fsdp_wrapped_module.a.weight"], "_fsdp_wrapped_module"),
    ],
)
def test_wrappers_prefixes_are_left_out_with_a_word(tmp_path, names, said):
    tensors = {name: weight(3) for name in names}
    with pytest.warns(InputWarning, match=said):
        checkpoint = open_checkpoint(written(tmp_path, tensors))
    assert sorted(checkpoint.names()) == ["a.weight", "norm.weight"]
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), weight(3))


def test_names_that_nothing_wraps_stay(tmp_path, recwarn):
    names = ["module.a.weight", "b.weight", "x.gamma", "x.beta"]
    assert sorted(open_checkpoint(written(tmp_path, {n: weight(3) for n in names})).names()) == sorted(names)
    assert not recwarn.list


def test_norms_by_their_old_names(tmp_path):
    tensors = {"LayerNorm.gamma": weight(3), "LayerNorm.beta": weight(3) + 1, "a.ln_1.gamma": weight(3)}
    checkpoint = open_checkpoint(written(tmp_path, tensors))
    assert sorted(checkpoint.names()) == ["LayerNorm.bias", "LayerNorm.weight", "a.ln_1.weight"]
    np.testing.assert_array_equal(checkpoint.read("LayerNorm.bias"), weight(3) + 1)


@pytest.mark.parametrize("name", ["base_model.model.q_proj.lora_A.default.weight", "q_proj.base_layer.weight"])
def test_a_peft_model_saved_whole_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"belongs to a PEFT model .* Merge them first"):
        open_checkpoint(written(tmp_path, {name: weight(2, 2)}))


def test_a_folder_of_two_models_says_which_is_read(tmp_path):
    written(tmp_path, {"a.weight": weight(2)})
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.warns(InputWarning, match=r"model\.safetensors is read, and not other\.gguf"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_the_model_is_not_applied_in_silence(tmp_path):
    written(tmp_path, {"a.weight": weight(2)})
    save_file({"x": weight(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.warns(InputWarning, match=r"holds an adapter beside the model .* not applied"):
        open_checkpoint(tmp_path)


def test_two_names_for_one_tensor(tmp_path):
    save_file({"_orig_mod.a": weight(2), "a": weight(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(InputWarning), pytest.raises(InputError, match="both mean 'a'"):
        open_checkpoint(tmp_path)
