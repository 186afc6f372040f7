"""Every method that PEFT has too, beside PEFT: the same file, the same outputs, merged as well, and the same loss curve.

The tests run over all methods with a `peft` form. A method whose defaults do not fit these small models (width 32, four heads) says what
fits in `THEIRS` and `OURS`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax import nnx
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lora_jax import InputError, inject, load_model, load_peft, merge, save_peft
from lora_jax.adapters.inject import LABEL, site_modules
from lora_jax.adapters.methods.peft_form import GENERAL
from lora_jax.adapters.parameters import AdapterParam
from lora_jax.adapters.partition import partition
from lora_jax.config.doors import METHODS
from lora_jax.interop.peft.config import method_of_type, untold
from tests.interop.test_peft_files import TOKENS, as_sets, assert_same_files, our_logits, their_logits
from tests.interop.zoo import Zoo

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4  # absolute, float32; outputs are of order 1
STEPS, RATE = 20, 3e-3
FORMS = {name: method for name, method in METHODS.all().items() if method.peft is not None}


@dataclasses.dataclass(frozen=True)
class Base:
    """A model of the zoo.

    Attributes:
        name: in the zoo.
        targets: modules to adapt, by PEFT's names; the last of them stands in the feed-forward part.
        conv1d: whether its linear layers are GPT-2's.
        norms: its norms, by PEFT's names.
    """

    name: str
    targets: tuple[str, ...]
    conv1d: bool = False
    norms: tuple[str, ...] = ("LayerNorm",)


LLAMA = Base("llama-gqa-bias", ("q_proj", "v_proj", "down_proj"), norms=("input_layernorm", "post_attention_layernorm", "norm"))
BASES = (
    LLAMA,
    Base("bert", ("query", "value", "output.dense")),
    Base("gpt2", ("c_attn", "mlp.c_proj"), conv1d=True, norms=("ln_1", "ln_2", "ln_f")),
)

ROWS = np.unique(TOKENS)[[4, 1, 2]].tolist()
# Method -> PEFT's options for a base, beside rank, alpha and targets.
THEIRS: dict[str, Callable[[Base], dict[str, Any]]] = {
    "trainable_tokens": lambda base: {"token_indices": ROWS, "target_modules": ["embed_tokens", "word_embeddings"]},
    "ia3": lambda base: {"feedforward_modules": list(base.targets[-1:])},
    "oft": lambda base: {"oft_block_size": 4},
    "road": lambda base: {"group_size": 8},
    "adalora": lambda base: {"target_r": 2, "total_step": 100},
    "ln_tuning": lambda base: {"target_modules": list(base.norms)},
}
# Method -> the keys of our section, beside rank, alpha and targets.
OURS: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": ROWS, "targets": "embedding"},
    "road": {"group_size": 8},
    "adalora": {"target_r": 2},
}


def cases(*, long: tuple[Base, ...] = (), but: tuple[str, ...] = ()) -> list[Any]:
    """(method, base), without those that PEFT does not adapt; some bases are for the long tests, but for some methods."""
    fitting = [(name, base) for name, method in FORMS.items() for base in BASES if method.peft.conv1d or not base.conv1d]
    return [
        pytest.param(n, base, id=f"{n}-{base.name}", marks=[pytest.mark.long] if base in long and n not in but else [])
        for n, base in fitting
    ]


# On the other shapes most methods are for the long tests: a file's keys and shapes are told from a site's, whose model is no matter.
EVERY = pytest.mark.parametrize(("name", "base"), cases(long=BASES[1:], but=("lora", "dora", "vera", "ln_tuning")))


def their_model(zoo: Zoo, name: str, base: Base, *, trained: bool = True) -> Any:
    """A PEFT model whose trained numbers are all drawn, or at their start with `trained` False."""
    form = FORMS[name].peft
    options: dict[str, Any] = {form.words[key]: value for key, value in {"rank": 4, "alpha": 6}.items() if key in form.words}
    options |= dict(form.flags) | {"target_modules": list(base.targets)} | THEIRS.get(name, lambda base: {})(base)
    torch.manual_seed(1)
    model = peft.get_peft_model(zoo.model(base.name), PEFT_TYPE_TO_CONFIG_MAPPING[form.peft_type](**options))
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def our_model(zoo: Zoo, base: Base) -> Any:
    return load_model(str(zoo.source(base.name)))


def our_adapter(model: nnx.Module, name: str, base: Base, **more: Any) -> nnx.Module:
    """An adapter made here, every trained number of it drawn."""
    alpha = {"alpha": 6} if "alpha" in FORMS[name].peft.words else {}
    values = {"method": name, "rank": 4, "targets": list(base.targets)} | alpha | OURS.get(name, {}) | more
    adapted = inject(model, METHODS.get(name, "method").section(**values), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for held in site_modules(adapted).values():
        for key, parameter in held.method.padded(held.site, held.extent).items():
            variable = getattr(held, key)
            if isinstance(variable, AdapterParam):
                noise = 0.1 * rng.standard_normal(variable.shape)
                if parameter.scope == "layer":  # of layers that are adapted, and not beyond their rank
                    own = np.zeros((len(held.ranks), *parameter.shape), np.float32)
                    for layer, rank in enumerate(held.ranks):
                        if rank:
                            own[(layer, *held.method.parameters(held.site, rank)[key].own)] = 1
                    noise = noise * own.reshape(variable.shape)
                variable.set_value(jnp.asarray(variable[...] + noise, jnp.float32))
    for _, variable in nnx.iter_graph(adapted):
        if FORMS[name].peft.modules and isinstance(variable, nnx.Variable) and variable.get_metadata().get(LABEL) == "norm":
            variable.set_value(jnp.asarray(variable[...] + 0.1 * rng.standard_normal(variable.shape), jnp.float32))
    return nnx.view(adapted, deterministic=True, raise_if_not_found=False)


def far(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one - two).max())


@pytest.mark.parametrize("name", FORMS)
def test_a_form_says_all_options_with_their_defaults(name: str) -> None:
    form = FORMS[name].peft
    needed: dict[str, Any] = {"total_step": 1} if "total_step" in form.defaults else {}
    theirs = PEFT_TYPE_TO_CONFIG_MAPPING[form.peft_type](**needed).to_dict() | dict.fromkeys(needed)
    theirs = {key: sorted(value) if isinstance(value, set) else value for key, value in theirs.items()}
    assert dict(form.defaults) == {k: v for k, v in theirs.items() if k not in GENERAL and k != "peft_type"}
    assert not untold(form)
    assert method_of_type(dict(form.defaults) | {"peft_type": form.peft_type} | dict(form.flags), "here").peft is form


@EVERY
def test_from_peft_and_back(name: str, base: Base, zoo: Zoo, tmp_path: Path) -> None:
    theirs = their_model(zoo, name, base)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_peft(our_model(zoo, base), tmp_path / "theirs")
    expected = their_logits(theirs)
    with theirs.disable_adapter():
        assert far(their_logits(theirs), expected) > 0.01  # the adapter shows
    assert far(our_logits(ours), expected) < TOLERANCE
    assert far(our_logits(merge(ours)), expected) < TOLERANCE
    assert far(their_logits(theirs.merge_and_unload()), our_logits(merge(ours))) < TOLERANCE
    save_peft(ours, tmp_path / "ours")
    if not FORMS[name].peft.repeated:
        assert_same_files(tmp_path / "theirs", tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(zoo.model(base.name), str(tmp_path / "ours")).eval()
    assert far(their_logits(again), expected) < 1e-6


@EVERY
def test_to_peft(name: str, base: Base, zoo: Zoo, tmp_path: Path) -> None:
    model = our_model(zoo, base)
    ours = our_adapter(model, name, base)
    assert far(our_logits(ours), our_logits(model)) > 0.01
    save_peft(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(zoo.model(base.name), str(tmp_path / "ours")).eval()
    assert far(our_logits(ours), their_logits(theirs)) < TOLERANCE
    again = load_peft(model, tmp_path / "ours")
    assert far(our_logits(again), our_logits(ours)) < 1e-6
    save_peft(again, tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "again")
    assert far(their_logits(theirs.merge_and_unload()), our_logits(merge(ours))) < TOLERANCE


@pytest.mark.parametrize("name", [name for name, method in FORMS.items() if "linear" in method.kinds])
def test_layers_and_presets_that_peft_does_not_know(name: str, zoo: Zoo, tmp_path: Path) -> None:
    """Every module is named outright."""
    model = our_model(zoo, LLAMA)
    ours = our_adapter(model, name, LLAMA, targets="mlp", layers="last:1")
    save_peft(ours, tmp_path / "ours")
    assert "target_modules" in as_sets(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(zoo.model(LLAMA.name), str(tmp_path / "ours")).eval()
    assert far(our_logits(ours), their_logits(theirs)) < TOLERANCE
    assert far(our_logits(load_peft(model, tmp_path / "ours")), our_logits(ours)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), cases(long=BASES[1:]))
def test_twenty_steps_of_adamw_follow_peft(name: str, base: Base, zoo: Zoo, tmp_path: Path) -> None:
    theirs = their_model(zoo, name, base)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = np.random.default_rng(5).standard_normal(their_logits(theirs).shape).astype(np.float32)
    ours = our_curve(load_peft(our_model(zoo, base), tmp_path / "theirs"), wanted)
    reference = their_curve(theirs, wanted)
    assert reference[-1] < reference[0]
    np.testing.assert_allclose(ours, reference, rtol=1e-3)
    assert abs(ours[0] / reference[0] - 1) < 1e-5


def our_curve(adapted: nnx.Module, wanted: np.ndarray) -> np.ndarray:
    part = partition(adapted)
    optimizer = optax.adamw(RATE, weight_decay=0.0)

    def loss_of(trainable: Any) -> jax.Array:
        model: Any = part.merge(trainable, part.settings, part.frozen, training=True)
        return jnp.mean((model(TOKENS) - wanted) ** 2)

    @jax.jit
    def step(trainable: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    trainable, state, losses = part.trainable, optimizer.init(part.trainable), []
    for _ in range(STEPS):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    return np.array(losses)


def their_curve(model: Any, wanted: np.ndarray) -> np.ndarray:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), []
    for _ in range(STEPS):
        out = model.base_model.model(input_ids=torch.tensor(TOKENS))
        loss = torch.mean(((out.logits if "logits" in out else out.last_hidden_state) - torch.tensor(wanted)) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


@pytest.mark.parametrize("name", FORMS)
def test_an_option_that_nobody_knows_is_named(name: str, zoo: Zoo, tmp_path: Path) -> None:
    model = our_model(zoo, LLAMA)
    save_peft(our_adapter(model, name, LLAMA), tmp_path / "ours")
    file = tmp_path / "ours" / "adapter_config.json"
    good = json.loads(file.read_text())
    for wrong in ({"use_magic": 1}, *({option: {"a": 1}} for option in FORMS[name].peft.unsupported)):
        file.write_text(json.dumps(good | wrong))
        with pytest.raises(InputError, match=next(iter(wrong))):
            load_peft(model, tmp_path / "ours")


def test_a_method_that_peft_does_not_have_is_refused_by_name(zoo: Zoo, tmp_path: Path) -> None:
    lacking = next(name for name, method in METHODS.all().items() if method.kinds and method.peft is None)
    model = our_model(zoo, LLAMA)
    adapted = inject(model, METHODS.get(lacking, "method").section(method=lacking, targets=["q_proj"]), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=lacking):
        save_peft(adapted, tmp_path / "ours")
