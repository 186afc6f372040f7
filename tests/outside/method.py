"""A method: each output of a linear layer times a trained number (IA3, arXiv:2205.05638, equation 1)."""

from typing import Literal

from lora_jax import register_method
from lora_jax.adapters.methods.base import Method
from lora_jax.adapters.parameters import Parameter
from lora_jax.config.schema import AdapterConfig


class GainSection(AdapterConfig):
    method: Literal["outside-gain"] = "outside-gain"


class Gain(Method):
    name, section = "outside-gain", GainSection
    kinds = ("linear",)

    def parameters(self, site, rank):
        return {"gain": Parameter((site.outputs,), axes=("out",), fill=1.0)}

    def settings(self, config, rank, alpha):
        return {}

    def init(self, site, rank, config, random, data):
        return {}

    def apply(self, module, *inputs, rows):
        y = module.base(*inputs)
        return (y * module.gain[...]).astype(y.dtype)

    def merged(self, module, weight, bias):
        gain = module.gain[...]
        return weight * gain[..., None, :], None if bias is None else bias * gain


register_method("outside-gain", Gain())
