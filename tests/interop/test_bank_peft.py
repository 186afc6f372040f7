"""Combined adapters and mixed batches against Hugging Face PEFT, on a small model with an embedding and linear layers."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from flax import nnx
from peft.utils import merge_utils

from lora_jax.adapters.bank import AdapterBank
from lora_jax.adapters.combine import METHODS, prune_random
from lora_jax.adapters.inject import inject, random_of, site_modules
from lora_jax.config.schema import AdapterConfig
from tests import tiny

pytestmark = pytest.mark.interop

VOCAB, WIDTH, HIDDEN = 23, 12, 20
SITES = ("embed", "up", "down")
# Name -> rank, alpha, sites. All at all sites: PEFT passes over adapters that a module lacks, in its sums as we do.
ADAPTERS = {"a": (3, 6.0, SITES), "b": (4, 2.0, SITES), "c": (2, 8.0, ("up", "embed"))}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.2}


class TheirNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, tokens: Any) -> Any:
        return self.down(torch.tanh(self.up(self.embed(tokens))))


class OurNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.down(jnp.tanh(self.up(self.embed(tokens))))


def change_of(module):
    """scale * A B of a site."""
    a, b, scale = (np.asarray(array, np.float64) for array in module.method.low_rank(module))
    return scale * (a @ b)


def ours(tensor: Any) -> Any:
    return jnp.asarray(tensor.detach().numpy())


@pytest.fixture
def both() -> tuple[Any, AdapterBank]:
    """The same base and adapters on both sides, the factors drawn here."""
    torch.manual_seed(0)
    net = TheirNet()
    base = OurNet()
    base.embed.embedding[...] = ours(net.embed.weight)
    for name in ("up", "down"):
        getattr(base, name).kernel[...] = ours(getattr(net, name).weight).T
    base.up.bias[...] = ours(net.up.bias)
    theirs, bank = None, AdapterBank(base)
    for name, (rank, alpha, sites) in ADAPTERS.items():
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(sites))
        if theirs is None:
            theirs = peft.get_peft_model(net, config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
        adapted = inject(base, AdapterConfig(rank=rank, alpha=alpha, targets=list(sites)), rngs=nnx.Rngs(0))
        for site, module in site_modules(adapted).items():
            layer = getattr(theirs.base_model.model, site)
            a, b = factors_of_layer(layer, name)
            torch.nn.init.normal_(a, std=0.3)
            torch.nn.init.normal_(b, std=0.3)
            module.lora_a[...], module.lora_b[...] = ours(a).T, ours(b).T
        bank.add(name, adapted)
    assert theirs is not None
    return theirs.eval(), bank


def factors_of_layer(layer: Any, name: str) -> tuple[Any, Any]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


CASES: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {"rank": 3},
    "svd at the default rank": {},
    "ties": {"rank": 4, "density": 0.4},
    "ties by frequency": {"rank": 2, "density": 0.7, "majority": "frequency"},
    "magnitude_prune": {"rank": 5, "density": 0.3},
    "dare_linear": {"rank": 4, "density": 0.5, "seed": 3},
    "dare_ties": {"rank": 12, "density": 0.6, "seed": 4},
}


def their_masks(monkeypatch: Any, seed: int) -> None:
    """PEFT draws what our adapters would keep: it prunes site after site, and the adapters of each in order."""
    calls = iter([(name, site) for site in SITES for name in ADAPTERS if site in ADAPTERS[name][2]])

    def pruned(tensor: Any, density: float, rescale: bool) -> Any:
        assert rescale
        name, site = next(calls)
        whole = tensor.detach().numpy()
        whole = whole if site == "embed" else whole.T  # (inputs, outputs)
        kept = prune_random(np.ones_like(whole), density, random_of(seed, f"{name}/{site}", 0)) != 0
        return tensor * torch.tensor(kept if site == "embed" else kept.T) / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)


@pytest.mark.parametrize("case", CASES)
def test_combined_changes_agree(both: tuple[Any, AdapterBank], monkeypatch: Any, case: str) -> None:
    theirs, bank = both
    options, method = CASES[case], case.split()[0]
    assert method in METHODS
    if "seed" in options:
        their_masks(monkeypatch, options["seed"])
    names = {"rank": "svd_rank", "density": "density", "majority": "majority_sign_method"}
    theirs.add_weighted_adapter(
        list(WEIGHTS),
        list(WEIGHTS.values()),
        "new",
        combination_type=method if method in ("cat", "svd") else f"{method}_svd",
        **{names[o]: v for o, v in options.items() if o in names},
    )
    bank.combine("new", WEIGHTS, method=method, **options)
    for site, module in site_modules(bank.use("new")).items():
        change = getattr(theirs.base_model.model, site).get_delta_weight("new").detach().numpy()
        assert tiny.relative(change_of(module), change if site == "embed" else change.T) < 1e-5, site
    tokens = np.arange(VOCAB)[None]
    theirs.set_adapter("new")
    assert tiny.relative(bank.model(tokens), theirs(torch.tensor(tokens)).detach().numpy()) < 1e-5


def test_linear_is_the_weighted_sum_and_pefts_is_not(both: tuple[Any, AdapterBank]) -> None:
    """PEFT mixes A and B of different adapters, so that its `linear` has cross terms; ours is what its `cat` is."""
    theirs, bank = both
    pair = {"a": 0.5, "same rank": 0.5}
    theirs.add_adapter("same rank", peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=list(SITES)))
    adapted = inject(bank.base, AdapterConfig(rank=3, alpha=6.0, targets=list(SITES)), rngs=nnx.Rngs(0))
    for site, module in site_modules(adapted).items():
        a, b = factors_of_layer(getattr(theirs.base_model.model, site), "same rank")
        torch.nn.init.normal_(a, std=0.3)
        torch.nn.init.normal_(b, std=0.3)
        module.lora_a[...], module.lora_b[...] = ours(a).T, ours(b).T
    bank.add("same rank", adapted)
    for method in ("cat", "linear"):
        theirs.add_weighted_adapter(list(pair), list(pair.values()), method, combination_type=method)
    bank.combine("new", pair)
    for site, module in site_modules(bank.use("new")).items():
        layer = getattr(theirs.base_model.model, site)
        cat, linear = (layer.get_delta_weight(m).detach().numpy() for m in ("cat", "linear"))
        got = change_of(module) if site == "embed" else change_of(module).T
        assert tiny.relative(got, cat) < 1e-5
        assert tiny.relative(got, linear) > 0.1


def test_mixed_batches_agree(both: tuple[Any, AdapterBank]) -> None:
    theirs, bank = both
    tokens = np.random.default_rng(0).integers(0, VOCAB, (6, 7))
    rows = ["b", None, "a", "c", "b", None]
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens), adapter_names=["__base__" if r is None else r for r in rows]).numpy()
    assert tiny.relative(bank.mixed(rows)(tokens), wanted) < 1e-5
    for name in ADAPTERS:
        theirs.set_adapter(name)
        with torch.no_grad():
            assert tiny.relative(bank.use(name)(tokens), theirs(torch.tensor(tokens)).numpy()) < 1e-5
    with theirs.disable_adapter(), bank.disabled(), torch.no_grad():
        assert tiny.relative(bank.model(tokens), theirs(torch.tensor(tokens)).numpy()) < 1e-5
