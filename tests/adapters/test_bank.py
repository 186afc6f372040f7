"""Many adapters on one base: added, switched, left out, removed."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.inject import inject
from lora_jax.adapters.merge import merge
from lora_jax.adapters.methods.base import Method
from lora_jax.adapters.parameters import Parameter
from lora_jax.adapters.partition import partition
from lora_jax.config.schema import AdapterConfig
from lora_jax.errors import InputError
from tests import tiny

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


class Net(nnx.Module):
    """Two layers and a head, run eagerly."""

    def __init__(self, seed=0, width=8):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(8, width, rngs=rngs)
        self.second = nnx.Linear(width, 8, rngs=rngs)
        self.classifier = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.classifier(self.second(jnp.tanh(self.first(x))))


def _set(model, name, value):
    module, _, parameter = name.rpartition(".")
    getattr(getattr(model, module), parameter)[...] = value


@pytest.fixture
def bank():
    base = Net()
    bank = AdapterBank(base)
    bank.add("both", tiny.trained(base, 1, targets="all-linear", dropout=0.5))
    bank.add("one", tiny.trained(base, 2, targets=["first"], rank=2))
    return bank


def test_switching_gives_each_adapter_its_own_outputs(bank):
    base = np.asarray(bank.base(X))
    for seed, name, values in ((1, "both", {"targets": "all-linear"}), (2, "one", {"targets": ["first"], "rank": 2})):
        wanted = tiny.trained(Net(), seed, **values)(X)
        np.testing.assert_array_equal(bank.use(name)(X), wanted)  # without the dropout that `both` trained with
        np.testing.assert_array_equal(bank.model(X), wanted)
        assert bank.active == name and tiny.relative(wanted, base) > 1e-2
        np.testing.assert_array_equal(merge(bank.model)(X), merge(tiny.trained(Net(), seed, **values))(X))
    assert bank.use(None) is bank.base and bank.active is None


def test_models_share_the_bases_arrays_whatever_base_they_were_made_on(bank):
    other = tiny.trained(Net(seed=9), 3, targets=["second"])
    bank.add("moved", other)
    base = tiny.base_arrays(bank.base)
    model = bank.use("moved")
    for module, plain in ((model.first, bank.base.first), (model.second.base, bank.base.second)):
        assert module.kernel.get_value() is plain.kernel.get_value() and module.bias.get_value() is plain.bias.get_value()
    np.testing.assert_array_equal(model.classifier.kernel[...], other.classifier.kernel[...])  # a head is trained: its own
    wanted = base["second.kernel"] + np.asarray(tiny.update_of(other.second))
    np.testing.assert_allclose(merge(model).second.merged.kernel[...], wanted, rtol=1e-6)


def test_disabled_is_the_base_inside_and_only_there(bank):
    bank.use("one")
    with bank.disabled() as model:
        assert model is bank.base and bank.model is bank.base and bank.active is None
        with bank.disabled():
            pass
        assert bank.active is None
    assert bank.active == "one"
    with pytest.raises(RuntimeError), bank.disabled():
        raise RuntimeError
    assert bank.active == "one" and bank.model is not bank.base


def test_removing(bank):
    bank.use("one")
    model = bank.model
    bank.remove("one")
    assert bank.names == ("both",) and bank.active is None and bank.model is bank.base
    assert tiny.relative(model(X), bank.base(X)) > 1e-2  # a model once made stays as it is
    with pytest.raises(InputError, match=r"no adapter 'one'.*both"):
        bank.mixed(["one"])
    bank.add("one", tiny.trained(bank.base, 5, targets=["second"]))
    assert bank.names == ("both", "one")


def test_trained_weights_of_the_base_switch_and_do_not_mix(bank):
    values = {"targets": ["first"], "bias": "lora_only", "modules_to_save": ["second"]}
    adapted = tiny.trained(bank.base, 4, **values)
    bank.add("untouched", adapted)
    assert len(bank.mixed(["untouched", "one"])(X[:2])) == 2  # trains them, but they are the base's still
    adapted.second.kernel[...] = adapted.second.kernel[...] + 1
    adapted.classifier.bias[...] = jnp.ones(3)
    bank.add("more", adapted)
    np.testing.assert_array_equal(bank.use("more")(X), adapted(X))
    np.testing.assert_array_equal(bank.use("untouched")(X), tiny.trained(bank.base, 4, **values)(X))
    with pytest.raises(InputError, match=r"'more': it trains weights of the base \(classifier\.bias, second\.kernel\)"):
        bank.mixed(["one", "more"])
    assert bank.row_ids(["both", None, "untouched"]).tolist() == [0, -1, 2]


def test_full_fine_tuning_switches_too(bank):
    full = inject(bank.base, AdapterConfig(method="full"), rngs=nnx.Rngs(0))
    full.first.kernel[...] = full.first.kernel[...] * 2
    bank.add("full", full)
    np.testing.assert_array_equal(bank.use("full")(X), full(X))
    assert tiny.relative(bank.use(None)(X), full(X)) > 1e-2


def test_a_bank_without_adapters_is_its_base():
    bank = AdapterBank(Net())
    assert bank.names == () and bank.model is bank.base
    np.testing.assert_array_equal(bank.mixed([None] * 3)(X), bank.base(X))


def test_bad_input(bank):
    with pytest.raises(InputError, match="'one' is in the bank already"):
        bank.add("one", tiny.trained(bank.base, 1, targets=["first"]))
    with pytest.raises(InputError, match=r"'wide': its model has another base than the bank; they differ in first\.bias, first\.kernel"):
        bank.add("wide", tiny.trained(Net(width=16), 1, targets=["first"]))
    with pytest.raises(InputError, match=r"no adapter 'bath' in the bank\. Did you mean 'both'"):
        bank.use("bath")
    with pytest.raises(InputError, match=r"no adapter 'ones'"):
        bank.remove("ones")
    with pytest.raises(InputError, match="already has adapters"):
        AdapterBank(bank.use("one"))
    with pytest.raises(InputError, match="already has adapters"):
        AdapterBank(bank.mixed(["one"]))
    assert bank.names == ("both", "one")


class Called(nnx.Module):
    """Modules called `base`, in modules called `base`."""

    def __init__(self, rngs):
        self.base = nnx.Linear(4, 4, rngs=rngs)
        self.inner = nnx.List([nnx.Dict(base=nnx.Linear(4, 4, rngs=rngs), kernel=nnx.Linear(4, 4, rngs=rngs))])

    def __call__(self, x):
        return self.inner[0].kernel(self.inner[0].base(self.base(x)))


def test_a_users_module_called_base_is_adapted_mixed_combined_and_merged():
    model, x = Called(nnx.Rngs(0)), np.ones((3, 4), np.float32)
    bank, adapted = AdapterBank(model), {n: tiny.trained(model, i, targets=["base"]) for i, n in enumerate("ab")}
    for name, one in adapted.items():
        bank.add(name, one)
        np.testing.assert_allclose(bank.use(name)(x), one(x), atol=1e-6)
    expected = np.stack([adapted["a"](x)[0], model(x)[1], adapted["b"](x)[2]])
    np.testing.assert_allclose(bank.mixed(["a", None, "b"])(x), expected, atol=1e-5)
    bank.combine("half", {"a": 1.0, "b": 0.0})
    np.testing.assert_allclose(bank.use("half")(x), adapted["a"](x), atol=1e-5)
    bank.add("merged", merge(adapted["b"]))
    np.testing.assert_allclose(bank.use("merged")(x), adapted["b"](x), atol=1e-6)


class Gain(Method):
    name, section, kinds = "bank-gain", AdapterConfig, ("linear",)

    def parameters(self, site, rank):
        return {"gain": Parameter((site.outputs,), fill=1.0)}

    def apply(self, module, *inputs, rows):
        return module.base(*inputs) * module.gain[...]


def test_what_a_bank_cannot_do_is_said(monkeypatch):
    model = Called(nnx.Rngs(0))
    lora, bank = tiny.trained(model, targets=["base"]), AdapterBank(model)
    with pytest.raises(InputError, match="'plain': nothing is trainable"):
        bank.add("plain", model)
    bank.add("lora", lora)
    monkeypatch.setattr("lora_jax.adapters.layout.method_of", lambda config: Gain())
    bank.add("gain", inject(model, AdapterConfig(targets=["base"]), rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="its method 'bank-gain' makes is not low-rank"):
        bank.mixed(["gain", "lora", None])
    with pytest.raises(InputError, match=r"'bank-gain' makes \('gain'\) is not low-rank"):
        bank.combine("both", {"gain": 1.0, "lora": 1.0})
    with pytest.raises(InputError, match="the model is merged"):
        partition(merge(lora))
