"""From a config to what training needs: the base with the task's head, the tokenizer, the batches."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from ..config.errors import InputError
from ..config.schema import Config
from ..data.batching import BatchPlan
from ..data.tasks import TaskData, prepare
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.heads import LabelWordClassifier, LanguageModel, SequenceClassifier
from ..models.loading import load_model
from ..models.stack import AXES
from ..models.tokenizer import load_tokenizer
from ..parallel.mesh import make_mesh, parameter_sharding


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all members of a run with the same model, task and batches share.

    Attributes:
        model: the base with the task's head; no adapters.
        data: tokenised examples.
        plan: the training batches.
        steps: optimizer steps.
        metric: what members are compared by; larger is better unless it is `loss`.
        mesh: the devices; the model's weights lie on it already.
    """

    model: nnx.Module
    data: TaskData
    plan: BatchPlan
    steps: int
    metric: str
    mesh: Mesh


def setup_key(config: Config) -> tuple[str, ...]:
    """Configs with equal keys share a `Setup`."""
    parts = (config.model, config.task, config.training, config.mesh)
    return tuple(p.model_dump_json(exclude={"seed", "eval_every"}) for p in parts)


def set_up(config: Config) -> Setup:
    """Loads the base, tokenises the data and plans the batches.

    Raises:
        InputError: the model, the data or their combination will not do.
    """
    mesh = make_mesh(config.mesh)
    tokenizer = load_tokenizer(config.model.source)
    base = load_model(config.model.source, dtype=config.model.dtype, remat=config.model.remat)
    data = prepare(config.task, tokenizer, decoder=base.is_decoder)
    _check_length(base, data)
    training = config.training
    plan = BatchPlan(
        data.train,
        data.held_out,
        batch_size=training.batch_size,
        accumulate=training.accumulate,
        batching=training.batching,
        seed=training.data_seed,
        per_example=data.per_example,
        row_multiple=mesh.shape["data"] * mesh.shape["fsdp"],
        steps=training.steps,
        epochs=training.epochs,
    )
    metric = "accuracy" if config.task.kind == "classification" else "loss"
    model = with_head(base, config, data)
    place_model(model, mesh)
    return Setup(model, data, plan, plan.steps, metric, mesh)


def place_model(model: nnx.Module, mesh: Mesh) -> None:
    """Moves a model's weights to where their logical axes belong on the mesh, in place."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            axes = variable.get_metadata().get(AXES, (None,) * variable.ndim)
            variable.set_value(jax.device_put(variable[...], parameter_sharding(mesh, variable.shape, axes)))


def with_head(base: Encoder | Decoder, config: Config, data: TaskData) -> nnx.Module:
    """The base with what turns its hidden states into the task's logits."""
    if isinstance(base, Encoder):
        if config.task.kind != "classification":
            raise InputError(f"task.kind: {config.task.kind} needs a decoder, and {config.model.source} is an encoder.")
        assert data.classes is not None
        return SequenceClassifier(base, len(data.classes), config.task.pooling, rngs=nnx.Rngs(0))
    if data.class_token_ids is not None:
        return LabelWordClassifier(base, tuple(int(i) for i in data.class_token_ids))
    return LanguageModel(base)


def _check_length(base: Encoder | Decoder, data: TaskData) -> None:
    if isinstance(base, Encoder):
        longest = max(len(t) for t in data.train.tokens)
        if longest > base.config.positions:
            raise InputError(f"task.max_length: examples of {longest} tokens, but the model has {base.config.positions} positions.")
