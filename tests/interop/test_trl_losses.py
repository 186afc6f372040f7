"""Losses of preferences against TRL's own, from the same log-probabilities of tokens. TRL is no dependency of anything here:

pip install --no-deps --target FOLDER trl, and PYTHONPATH=FOLDER.
"""

from __future__ import annotations

import collections
import importlib
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from lora_jax.tasks.base import objective_of, task_section
from lora_jax.tasks.preference_losses import REFERENCE

pytestmark = pytest.mark.interop

PAIRS, LENGTH, WORDS = 6, 11, 13


def trl_class(module: str, name: str) -> Any:
    """A trainer's class; skips where this TRL has none there, or needs what is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{module}.{name}: {error}")


def stub(**values: Any) -> Any:
    """What a trainer's loss asks of the trainer."""
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    made = {"accelerator": accelerator, "model": types.SimpleNamespace(training=False), "aux_loss_enabled": False, "ld_alpha": None}
    made |= {
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
        "use_weighting": False,
        "_total_train_tokens": 0,
    }
    return types.SimpleNamespace(**made, _metrics={"eval": collections.defaultdict(list)}, **values)


class Data:
    """Random log-probabilities of the tokens of some responses, as arrays (responses, length) and as a batch of ours."""

    def __init__(self, roles: list[tuple[int, ...]]):
        rng = np.random.default_rng(3)
        owners = [(e, r) for e, own in enumerate(roles) for r in own]
        lengths = rng.integers(2, LENGTH, len(owners))
        self.mask = np.arange(LENGTH) < lengths[:, None]
        logits = rng.standard_normal((len(owners), LENGTH, WORDS)).astype(np.float32)
        ids = rng.integers(0, WORDS, (len(owners), LENGTH))
        logp = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        self.logp = np.where(self.mask, np.take_along_axis(logp, ids[..., None], 2)[..., 0], 0).astype(np.float64)
        self.reference = np.where(self.mask, self.logp + 0.4 * rng.standard_normal(self.logp.shape), 0)
        owner = np.repeat(np.array(owners), lengths, axis=0)
        self.features = jnp.asarray(logits[self.mask])
        arrays = {
            "target_ids": ids[self.mask].astype(np.int32),
            "target_weights": np.ones(len(owner), np.float32),
            "target_examples": owner[:, 0].astype(np.int32),
            "target_roles": owner[:, 1].astype(np.int32),
            "example_weights": np.ones(len(roles), np.float32),
            REFERENCE: self.reference[self.mask].astype(np.float32),
        }
        self.batch = {name: jnp.asarray(a) for name, a in arrays.items()}

    def ours(self, **values: Any) -> tuple[float, float, dict[str, float]]:
        """Mean loss, fraction of right predictions, and the other means."""
        columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
        objective: Any = objective_of(task_section(kind="preference", source="a", **columns, **values))
        model = types.SimpleNamespace(readout=lambda: lambda x: x)
        loss, right, means = objective(model, self.features, self.batch)
        count = float(self.batch["example_weights"].sum())
        return float(loss) / count, float(right) / count, {name: float(a / b) for name, (a, b) in means.items()}

    def padded(self, rows: Any) -> Any:
        """Token ids and completion mask as TRL has them, a prompt of one token before the responses, and the model's outputs there."""
        mask = torch.tensor(np.pad(self.mask[rows], [(0, 0), (1, 0)]).astype(np.int64))
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        zeros = torch.zeros(mask.shape[0], LENGTH)
        outputs = types.SimpleNamespace(
            log_probs=torch.tensor(self.logp[rows]), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=None
        )
        return inputs, lambda **_: outputs


def pairs() -> tuple[Data, slice, slice]:
    """Pairs, and which rows are the chosen and the rejected."""
    return Data([(0, 1)] * PAIRS), slice(0, None, 2), slice(1, None, 2)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", {"loss": "dpo", "beta": 0.3}),
        ("sigmoid_norm", {"loss": "dpo", "beta": 0.3, "per_token": True}),
        ("ipo", {"loss": "ipo", "beta": 0.3, "per_token": True}),
    ],
)
def test_dpo_and_ipo(theirs: str, ours: dict[str, Any]) -> None:
    trainer = trl_class("trl.trainer.dpo_trainer", "DPOTrainer")
    data, chosen, rejected = pairs()
    order = np.concatenate([np.arange(2 * PAIRS)[chosen], np.arange(2 * PAIRS)[rejected]])
    inputs, model = data.padded(order)
    sums = data.reference.sum(1)
    inputs |= {"ref_chosen_logps": torch.tensor(sums[chosen]), "ref_rejected_logps": torch.tensor(sums[rejected])}
    self = stub(beta=0.3, loss_types=[theirs])
    wanted = trainer._compute_loss(self, model, inputs, False)
    loss, right, means = data.ours(**ours)
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    if theirs == "sigmoid":
        said = {name: values[0] for name, values in self._metrics["eval"].items()}
        assert right == pytest.approx(said["rewards/accuracies"])
        for name, key in (("margin", "margins"), ("chosen_reward", "chosen"), ("rejected_reward", "rejected")):
            assert means[name] == pytest.approx(said[f"rewards/{key}"], rel=1e-4)


def test_conservative_dpo_and_simpo() -> None:
    """TRL's smoothed sigmoid is CPO's, of the log-probabilities: of the log-ratios it is conservative DPO."""
    trainer = trl_class("trl.experimental.cpo.cpo_trainer", "CPOTrainer")
    data, chosen, rejected = pairs()
    common = {"alpha": 0.0, "simpo_gamma": 0.7, "accelerator": types.SimpleNamespace(device="cpu")}
    ratio = torch.tensor((data.logp - data.reference).sum(1))
    self = types.SimpleNamespace(beta=0.3, label_smoothing=0.2, loss_type="sigmoid", **common)
    wanted = trainer.cpo_loss(self, ratio[chosen], ratio[rejected])[0].mean()
    assert data.ours(loss="dpo", beta=0.3, label_smoothing=0.2)[0] == pytest.approx(float(wanted), rel=1e-5)
    mean = torch.tensor(data.logp.sum(1) / data.mask.sum(1))
    self = types.SimpleNamespace(beta=2.5, label_smoothing=0.0, loss_type="simpo", **common)
    losses, good, bad = trainer.cpo_loss(self, mean[chosen], mean[rejected])
    loss, right, means = data.ours(loss="simpo", beta=2.5, simpo_gamma=0.7)
    assert loss == pytest.approx(float(losses.mean()), rel=1e-5) and right == pytest.approx(float((good > bad).float().mean()))
    assert means["margin"] == pytest.approx(float((good - bad).mean()), rel=1e-4)


def test_orpo() -> None:
    """TRL's loss of a batch: the language model's (here of each response's mean, as in the paper), less the odds ratio's."""
    trainer = trl_class("trl.experimental.orpo.orpo_trainer", "ORPOTrainer")
    data, chosen, rejected = pairs()
    mean = torch.tensor(data.logp.sum(1) / data.mask.sum(1))
    self = types.SimpleNamespace(beta=0.4, accelerator=types.SimpleNamespace(device="cpu"))
    losses, *_ = trainer.odds_ratio_loss(self, mean[chosen], mean[rejected])
    assert data.ours(loss="orpo", orpo_lambda=0.4)[0] == pytest.approx(float((-mean[chosen] - losses).mean()), rel=1e-5)


def test_kto() -> None:
    trainer = trl_class("trl.trainer.kto_trainer", "KTOTrainer")
    data = Data([(0, 2), (1, 2), (1, 2), (0, 2), (0, 2)])
    own, other = slice(0, None, 2), slice(1, None, 2)
    inputs, model = data.padded(own)
    sums = data.reference.sum(1)
    inputs |= {"label": torch.tensor([True, False, False, True, True])}
    inputs |= {"ref_logps": torch.tensor(sums[own]), "ref_KL_logps": torch.tensor(sums[other])}
    values = {"beta": 0.5, "desirable_weight": 1.4, "undesirable_weight": 0.6}
    self = stub(calculate_KL=True, loss_type="kto", **values, _compute_kl_logps=lambda *_: torch.tensor(data.logp.sum(1)[other]))
    wanted = trainer._compute_loss(self, model, inputs, False)
    loss, _, means = data.ours(loss="kto", **values)
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    said = {name: found[0] for name, found in self._metrics["eval"].items()}
    for name in ("chosen", "rejected"):
        assert means[f"{name}_reward"] == pytest.approx(said[f"rewards/{name}"], rel=1e-4)
