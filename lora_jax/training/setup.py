"""From a config to what training needs: the base with the task's head, the tokenizer, the batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..adapters.inject import inject_layout
from ..adapters.layout import resolve, unite
from ..adapters.partition import Partition
from ..config.schema import Config, TaskConfig
from ..data.batching import BatchPlan
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.heads import Classifier, HiddenStates, LabelWordClassifier, LanguageModel, add_head
from ..models.layers import AXES
from ..models.load import load_model
from ..parallel.batches import place_batch
from ..parallel.mesh import make_mesh, parameter_sharding, place
from ..parallel.program import release_freed_memory
from ..tasks.distillation import Teacher, check_teacher
from ..tasks.prepare import TaskData, prepare
from ..weights.provenance import fingerprint
from ..weights.tokenizer import load_tokenizer
from .trunk import Prefix, prefix_depth


class Newest:
    """Remembers the newest value alone: never two bases in memory, nor programs that nothing will run again."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: Any = None

    def find(self, key: object) -> Any:
        """The value of this key; None where there is none, and that of another is forgotten."""
        if self.key != key:
            self.forget()
        return self.value

    def forget(self) -> None:
        self.key = self.value = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        if self.key != key:
            self.forget()
            self.value = make()
            self.key = key
        return self.value


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all members of a run with the same model, task and batches share.

    Attributes:
        model: the base with the task's head; no adapters.
        base: the pretrained model inside of it.
        data: tokenised examples.
        plan: the training batches.
        steps: optimizer steps.
        metric: what members are compared by; larger is better unless it is `loss`.
        mesh: the devices; the model's weights lie on it already.
        teacher: makes the targets of a distillation; None of other tasks.
        prefixes: of packs, the newest.
        programs: of packs, the newest, by the packs' form: packs of one form share them.
    """

    model: nnx.Module
    base: Encoder | Decoder
    data: TaskData
    plan: BatchPlan
    steps: int
    metric: str
    mesh: Mesh
    teacher: Teacher | None = None
    prefixes: Newest = dataclasses.field(default_factory=Newest)
    programs: Newest = dataclasses.field(default_factory=Newest)

    def prefix(self, part: Partition, data_seed: int) -> Prefix | None:
        """What the members of a pack have in common; None where they have nothing. Successive packs of one depth have one."""
        depth = prefix_depth(part, {name: array[0] for name, array in self.plan.batch(0).items()})
        return self.prefixes.get((depth, data_seed), lambda: Prefix(part, depth, data_seed, self.mesh)) if depth else None

    def step_inputs(self, step: int, batch: dict[str, np.ndarray], prefix: Prefix | None) -> dict[str, jax.Array]:
        """A training batch on the mesh as a pack's step takes it, with what is computed once for all members."""
        placed = place_batch(self.mesh, batch, row_axis=1)
        common = {} if prefix is None else {"prefix": prefix.of_step(step, placed, batch)}
        return placed | common | ({} if self.teacher is None else {"target_values": self.teacher.of_step(placed)})

    def held_out_inputs(self, batch: dict[str, np.ndarray], prefix: Prefix | None) -> dict[str, jax.Array]:
        """The same of a batch to evaluate, which has no micro axis."""
        placed = place_batch(self.mesh, batch, row_axis=0)
        common = {} if prefix is None else {"prefix": prefix.of_held_out(placed, batch)}
        return placed | common | ({} if self.teacher is None else {"target_values": self.teacher.of_held_out(placed)})

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the pretrained weights; taken when first asked for. A new head is no part of it: each member draws its own."""
        return fingerprint(self.base)


def setup_key(config: Config) -> tuple[str, ...]:
    """Configs with equal keys share a `Setup`."""
    parts = (config.model, config.task, config.training, config.mesh)
    return tuple(p.model_dump_json(exclude={"seed", "eval_every", "pack", "chunk"}) for p in parts)


class Preparer:
    """Makes setups. What a config has in common with the one before it (base, examples, all) is not loaded again."""

    def __init__(self) -> None:
        self._base, self._data, self._setup, self._teacher = Newest(), Newest(), Newest(), Newest()

    def __call__(self, config: Config) -> Setup:
        """The setup of a config; see `set_up`."""
        head = config.task.kind if config.task.head == "loaded" else None
        base_key = (config.model.model_dump_json(), config.mesh.model_dump_json(), head)
        data_key = (config.model.source, config.task.model_dump_json(exclude={"teacher"}))

        def make() -> Setup:
            mesh = make_mesh(config.mesh)
            loaded = self._base.get(base_key, lambda: _load(config, mesh, head))
            base, known = (loaded.base, loaded.class_names) if isinstance(loaded, Classifier) else (loaded, ())
            _check_kind(base, config)

            def read() -> TaskData:
                return prepare(config.task, load_tokenizer(config.model.source), decoder=base.is_decoder, known=known)

            data, teacher = self._data.get(data_key, read), None
            if config.task.teacher is not None:
                teacher = self._teacher.get((config.task.teacher, base_key), lambda: _load_teacher(config, mesh, base))
            return _assemble(config, mesh, loaded, data, teacher)

        return self._setup.get(setup_key(config), make)


def set_up(config: Config) -> Setup:
    """Loads the base, tokenises the data and plans the batches.

    Raises:
        InputError: the model, the data or their combination will not do.
    """
    return Preparer()(config)


def check_adapters(setup: Setup, configs: Sequence[Config]) -> None:
    """`InputError` unless the configs' adapters fit the model; nothing is compiled or kept.

    Args:
        setup: what the configs share.
        configs: members of one pack.
    """
    inject_layout(setup.model, unite(setup.model, [resolve(setup.model, c.adapter) for c in configs]))


def _load(config: Config, mesh: Mesh, head: str | None) -> Encoder | Decoder | Classifier:
    model = config.model
    options = {"dtype": model.dtype, "remat": model.remat, "scan_layers": model.scan_layers, "dropout": model.dropout}
    return load_model(model.source, **options, mesh=mesh, head=head)


def _load_teacher(config: Config, mesh: Mesh, student: Encoder | Decoder) -> Teacher:
    source = str(config.task.teacher)
    base = load_model(source, dtype=config.model.dtype, mesh=mesh, key="task.teacher")
    check_teacher(base, student, source)
    return Teacher(HiddenStates(base), mesh)


def _check_kind(base: Encoder | Decoder, config: Config) -> None:
    if isinstance(base, Encoder) and config.task.kind == "causal_lm":
        raise InputError(f"task.kind: {config.task.kind} needs a decoder, and {config.model.source} is an encoder.")
    if isinstance(base, Decoder) and config.task.kind == "classification" and config.task.head == "loaded":
        raise InputError("task.head: a decoder classifies by the words for its classes, without a head that could be loaded.")


def _assemble(config: Config, mesh: Mesh, loaded: Encoder | Decoder | Classifier, data: TaskData, teacher: Teacher | None) -> Setup:
    base = loaded.base if isinstance(loaded, Classifier) else loaded
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
        extra_steps=training.extend_steps,
    )
    model = loaded if isinstance(loaded, Classifier) else with_head(loaded, config, data)
    place_model(model, mesh)
    release_freed_memory()
    return Setup(model, base, data, plan, plan.steps, data.metric, mesh, teacher)


def place_model(model: nnx.Module, mesh: Mesh) -> None:
    """Moves a model's weights to where their logical axes belong on the mesh, in place."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            axes = variable.get_metadata().get(AXES, (None,) * variable.ndim)
            variable.set_value(place(variable[...], parameter_sharding(mesh, variable.shape, axes)))


def with_head(base: Encoder | Decoder, config: Config, data: TaskData) -> nnx.Module:
    """The base with what turns its hidden states into the task's logits."""
    if isinstance(base, Decoder) and data.class_token_ids is not None:
        return LabelWordClassifier(base, tuple(int(i) for i in data.class_token_ids))
    return task_model(base, config.task, data.classes)


def task_model(base: Encoder | Decoder, task: TaskConfig, classes: Sequence[str] | None) -> Classifier | LanguageModel | HiddenStates:
    """The same parameters without any data: a decoder that answers in words is a language model like any other."""
    if task.kind == "distillation":
        return HiddenStates(base)
    if task.kind in ("token_classification", "question_answering") or isinstance(base, Encoder):
        return add_head(base, task.kind, len(classes or ()), pooling=task.pooling, rngs=nnx.Rngs(0))
    return LanguageModel(base)


def _check_length(base: Encoder | Decoder, data: TaskData) -> None:
    most = base.config.longest if isinstance(base, Encoder) else base.config.positions
    longest = int(max(data.train.lengths.max(), data.held_out.lengths.max()))
    if most is not None and longest > most:
        raise InputError(f"task.max_length: examples of {longest} tokens, but the model has {most} positions.")
