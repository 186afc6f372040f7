"""From a config to what training needs: the base with the task's head, the examples, the batches."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..adapters.inject import inject_layout
from ..adapters.layout import Layout, ResolvedAdapter, resolve, unite
from ..adapters.partition import Partition
from ..config.schema import Config, TaskConfig, TrainingConfig
from ..data.batching import BatchPlan
from ..data.episodes import EpisodePlan, PromptPlan
from ..data.pairs import Shift
from ..data.store import FOLDER, TokenFiles, largest
from ..errors import InputError
from ..generation.decoding import completions
from ..generation.generate import context_length
from ..models.encoder import Encoder
from ..models.encoder_decoder import Base, EncoderDecoder, Generative, TextBase
from ..models.heads import Classifier
from ..models.layers import AXES
from ..models.load import BaseFiles
from ..models.policy import Policy
from ..models.transforms.base import apply_shapes, shapes_known
from ..models.vision import VisionBase
from ..parallel.constraints import place_batch
from ..parallel.mesh import make_mesh, parameter_sharding, place
from ..parallel.program import release_freed_memory
from ..tasks.base import TaskData, TaskMetrics, objective_of, task_of
from ..tasks.objectives import Objective
from ..tasks.on_policy import OnPolicy
from ..tasks.prepare import prepare
from ..weights.provenance import fingerprint, tokenizer_digest
from ..weights.tokenizer import load_tokenizer
from .optimizer import updates_of
from .optimizers.base import optimizer_of
from .shared import SharedProgram, one_copy
from .statistics import Seen, calibrate, gather, joined, lacks
from .trunk import Trunk, trunk_depth


class SingleSlotCache:
    """Keeps only the newest value, so that there are never two bases in memory, nor programs that will not run again."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: Any = None

    def find(self, key: object) -> Any:
        """The value of this key. If the slot holds another key, it is emptied, and the result is None."""
        if self.key != key:
            self.forget()
        return self.value

    def forget(self) -> None:
        """Empties the slot."""
        self.key = self.value = None

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """The value of this key. If it is not there, the slot is emptied, then filled by `make`. If `make` fails, it stays empty."""
        if self.key != key:
            self.forget()
            self.value = make()
            self.key = key
        return self.value


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all members of a run with the same model, task and batches have in common.

    Attributes:
        model: the base with the task's head; no adapters.
        base: the pretrained model inside it.
        data: tokenised examples.
        plan: the training batches.
        steps: optimizer steps.
        mesh: the devices; the model's weights are already placed on it.
        shared: what the task computes once for all members, if anything.
        tokenizer: digest of the tokenizer and its chat template.
        trunks: the newest trunk; successive packs of one depth share it.
        programs: the newest compiled programs, by program key: packs with equal keys share them.
        specs: what each adapter config adapts, by the config's JSON.
        layouts: the layout of each set of adapter configs.
        gathered: statistics of the data, by the number of batches.
    """

    model: nnx.Module
    base: Base
    data: TaskData
    plan: BatchPlan | EpisodePlan | PromptPlan
    steps: int
    mesh: Mesh
    shared: SharedProgram | None = None
    tokenizer: str = ""
    trunks: SingleSlotCache = dataclasses.field(default_factory=SingleSlotCache)
    programs: SingleSlotCache = dataclasses.field(default_factory=SingleSlotCache)
    specs: dict[str, ResolvedAdapter] = dataclasses.field(default_factory=dict)
    layouts: dict[frozenset[str], Layout] = dataclasses.field(default_factory=dict)
    gathered: dict[int, Seen] = dataclasses.field(default_factory=dict)

    def objective(self, config: Config) -> Objective | OnPolicy:
        """The loss of a config's task, or how its members make batches and learn of them."""
        return objective_of(config.task, self.data, completions)

    @property
    def metrics(self) -> TaskMetrics:
        """The metrics computed for each member, and the one that members are compared by."""
        return self.data.metrics

    def spec(self, config: Config) -> ResolvedAdapter:
        """The sites of the model that a member adapts; resolved once."""
        key = config.optimizer.kind + config.adapter.model_dump_json()
        if key not in self.specs:
            spec = resolve(self.model, config.adapter)
            spec.method.check_steps(spec.config, self.steps * updates_of(config))
            if self.data.collected is not None and spec.method.wants(spec.config):
                raise InputError(f"adapter: the init reads training batches, and members of '{config.task.kind}' make their own.")
            optimizer_of(config.optimizer).check(unite(self.model, [spec]))
            self.specs[key] = spec
        return self.specs[key]

    def layout(self, configs: Sequence[Config]) -> Layout:
        """The smallest layout that holds all of these members; computed once."""
        adapters = {c.adapter.model_dump_json(): c for c in configs}
        key = frozenset(adapters)
        if key not in self.layouts:
            self.layouts[key] = unite(self.model, [self.spec(c) for c in adapters.values()])
        return self.layouts[key]

    def statistics(self, configs: Sequence[Config]) -> dict[int, Seen]:
        """Number of batches -> what the layers that these members adapt saw of so many; empty where no init asks for it.

        What an earlier pack of this set-up has gathered is not gathered again.
        """
        groups: dict[int, list[Config]] = {}
        for config in configs:
            spec = self.spec(config)
            if spec.method.wants(spec.config):
                groups.setdefault(spec.method.init_batches(spec.config), []).append(config)
        for count, members in groups.items():
            known, wants = self.gathered.setdefault(count, {}), frozenset[str]()
            for spec in map(self.spec, members):
                own = spec.method.wants(spec.config)
                layers = [(name, int(i)) for name, site in spec.sites.items() for i in np.flatnonzero(site.ranks)]
                wants |= own if any(lacks(known, where, own) for where in layers) else frozenset()
            if wants:
                batches = (self.step_inputs(i, self.plan.batch(i), None) for i in range(count))
                options = {"seed": members[0].training.data_seed, "mesh": self.mesh}
                sites, objective = self.layout(members).sites, cast(Objective, objective_of(members[0].task))
                self.gathered[count] = joined(known, gather(self.model, sites, wants, batches, objective, **options))
        return {count: self.gathered[count] for count in groups}

    def trunk(self, part: Partition, data_seed: int) -> Trunk | None:
        """The trunk of a pack's members; None if they have no layer in common. Successive packs of one depth share it."""
        if self.data.collected is not None:  # what members collect is their own, from the first layer on
            return None
        depth = trunk_depth(part, {name: array[0] for name, array in self.plan.batch(0).items()})
        return self.trunks.get((depth, data_seed), lambda: Trunk(part, depth, data_seed, self.mesh)) if depth else None

    def step_inputs(self, step: int, batch: dict[str, np.ndarray], trunk: Trunk | None) -> dict[str, jax.Array]:
        """A training batch on the mesh, as a pack's step takes it, with everything that is computed once for all members."""
        placed = place_batch(self.mesh, batch, row_axis=1)
        common = {} if trunk is None else {"trunk": trunk.of_step(step, placed, batch)}
        if (shared := self.shared) is not None:
            common[shared.name] = shared.of_step(placed, batch, self.pass_over())
        return placed | common

    def held_out_inputs(self, batch: dict[str, np.ndarray], trunk: Trunk | None) -> dict[str, jax.Array]:
        """The same for an evaluation batch, which has no micro axis."""
        placed = place_batch(self.mesh, batch, row_axis=0)
        common = {} if trunk is None else {"trunk": trunk.of_held_out(placed, batch)}
        if (shared := self.shared) is not None and shared.held_out:
            common[shared.name] = shared.of_held_out(placed, batch)
        return placed | common

    def pass_over(self) -> Iterator[dict[str, np.ndarray]]:
        """Every training example of the run once, in batches that depend on nothing but the plan."""
        plan = cast(BatchPlan, self.plan)
        yield from plan.eval_batches(plan.seen())

    @property
    def layer_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of one of the base's largest matrices."""
        if isinstance(self.base, VisionBase):
            return self.base.layer_sizes
        if isinstance(self.base, Policy):
            shape: Any = self.base.config
            return max(shape.layers.values(), key=lambda sizes: sizes[0] * sizes[1])
        return self.base.config.block.width, self.base.config.block.hidden

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the pretrained weights, computed on first use. A new head is not part of it: each member draws its own."""
        return fingerprint(self.base)

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Part (`tracking.state.IDENTITY`) -> digest of what members of this setup are trained and evaluated on."""
        digests = [examples.digest for examples in self.data.parts]
        known = {"base": self.fingerprint, "tokenizer": self.tokenizer, **dict(zip(("train", "held_out", "test"), digests, strict=False))}
        # What the base itself computes once an example follows from it.
        if self.shared is not None and not (self.shared.once and getattr(self.shared.model, "base", None) is self.base):
            known["shared"] = fingerprint(self.shared.model)
        return known | {"code": f"lora-jax {importlib.metadata.version('lora-jax')}"}


def setup_key(config: Config) -> tuple[str, ...]:
    """Configs with equal keys share a `Setup`."""
    parts = (config.model, config.task, config.training, config.mesh)
    return tuple(p.model_dump_json(exclude={"seed", "eval_every", "pack", "chunk"}) for p in parts)


def set_up(config: Config) -> Setup:
    """Loads the base, tokenises the data and plans the batches.

    Raises:
        InputError: the model, the data or their combination is not valid.
    """
    return Preparer()(config)


class Preparer:
    """Makes setups. What a config shares with the one before it (base, examples, everything) is not loaded again.

    Args:
        weights: if False, only headers, config and data are read, unless a transform needs the weights, and parameters are shapes
            (`jax.ShapeDtypeStruct`). Such a setup can be planned and compiled for (`packing.cost.PackShapes`), but not trained.
    """

    def __init__(self, *, weights: bool = True) -> None:
        self._weights = weights
        self._base, self._data, self._shared, self._setup = (SingleSlotCache() for _ in range(4))

    def __call__(self, config: Config) -> Setup:
        """The setup of a config; see `set_up`."""
        return self._setup.get(setup_key(config), lambda: self._make(config))

    def _make(self, config: Config) -> Setup:
        section, task, mesh = config.task, task_of(config.task), make_mesh(config.mesh)
        base_key = (config.model.model_dump_json(), config.mesh.model_dump_json(), task.loaded_head(section))
        data_key = (config.model.source, section.model_dump_json(exclude=set(task.shared_keys)))
        # What is shared is compiled for one shape of batches, and may be kept of their examples; the loss has no part in it.
        shared_key = (section.model_dump_json(exclude=set(task.loss_keys)), base_key, setup_key(config)[2:])

        # The base, with the head that it was saved with where the task wants that one.
        loaded = self._base.get(base_key, lambda: self._load(config, mesh, task.loaded_head(section)))
        base, known = (loaded.base, loaded.class_names) if isinstance(loaded, Classifier) else (loaded, ())
        task.check_base(section, base, config.model.source)

        # The examples.
        def examples() -> tuple[TaskData, str]:
            if not task.tokenized:
                return task.own_data(section, base, known), ""
            if isinstance(base, VisionBase):
                raise InputError(f"task.kind: '{section.kind}' reads texts, but {config.model.source} is a model over images.")
            assert isinstance(section, TaskConfig)
            tokenizer = load_tokenizer(config.model.source)
            shift = Shift(base.config.start) if isinstance(base, EncoderDecoder) else None
            store = TokenFiles(Path(config.tracking.dir) / FOLDER)
            found = prepare(section, tokenizer, decoder=base.is_decoder, known=known, shift=shift, store=store)
            return found, tokenizer_digest(tokenizer)

        data, tokenizer = self._data.get(data_key, examples)
        if task.tokenized:
            check_data(base, data, known)

        # What is computed once for all members.
        def load(source: str | None, *, key: str, head: str | None = None) -> Any:
            model = config.model
            if source is None and not model.transforms and head in (None, task.loaded_head(section)):
                return base if head is None else loaded
            files = BaseFiles(source or model.source, dtype=model.dtype, key=key, head=head)
            return one_copy(files.load(mesh), loaded) if self._reads_weights(config) else files.model

        def share() -> SharedProgram | None:
            found = task.shared(section, base, load, data)
            return None if found is None else SharedProgram(found, mesh)

        shared = self._shared.get(shared_key, share)

        # The batches, and the model that sees them.
        plan = _plan(config, data, mesh)
        model = loaded if isinstance(loaded, Classifier) else task.model(section, base, data.classes, data.class_token_ids)
        if self._reads_weights(config):
            place_model(model, mesh)
        release_freed_memory()
        return Setup(model, base, data, plan, plan.steps, mesh, shared, tokenizer)

    def _load(self, config: Config, mesh: Mesh, head: str | None) -> Base | Classifier:
        model = config.model
        options: dict[str, Any] = {"dtype": model.dtype, "remat": model.remat, "scan_layers": model.scan_layers, "dropout": model.dropout}
        options |= {"train_batch_stats": model.train_batch_stats, "transforms": model.transforms, "quantized": model.quantized}
        files = BaseFiles(model.source, **options, head=head)
        return files.load(mesh, calibrate) if self._reads_weights(config) else apply_shapes(files.model, model.transforms)

    def _reads_weights(self, config: Config) -> bool:
        return self._weights or not shapes_known(config.model.transforms)  # a transform's shapes may depend on the weights


def check_data(base: TextBase, data: TaskData, known: Sequence[str] = ()) -> None:
    """Checks that model and data fit together, before anything is compiled.

    Args:
        base: the pretrained model.
        data: the tokenised examples.
        known: the classes of a loaded head, in order; empty for a new head.

    Raises:
        InputError: an example has more tokens than the model has positions, or a token, token type or class is not one of the model's.
    """
    most = base.config.longest
    longest = max(examples.longest_text for examples in data.parts)
    if most is not None and longest > most:
        raise InputError(f"task.max_length: examples of {longest} tokens, but the model has {most} positions.")
    rooms = [(max(map(len, e.prompts.tokens)), e.prompts.max_new_tokens) for e in data.parts if e.prompts is not None]
    for asked, new in [*rooms, *(() if data.collected is None else ((longest, data.collected.room),))]:
        room = context_length(base) if isinstance(base, Generative) else None
        together = max(asked, new) if isinstance(base, EncoderDecoder) else asked + new
        if room is not None and together > room:
            raise InputError(f"task.max_new_tokens: prompts of {asked:,} tokens and {new:,} more exceed the model's context of {room:,}.")
    own = () if data.class_token_ids is None else (int(data.class_token_ids.max()),)
    token = max(*own, *(largest(examples.tokens) for examples in data.parts))
    fed = max((largest(examples.decoder_tokens) for examples in data.parts if examples.decoder_tokens is not None), default=0)
    source_vocab = (base.config.source_vocab if isinstance(base, EncoderDecoder) else None) or base.config.vocab
    for given, rows in ((token, source_vocab), (fed, base.config.vocab)):
        if given >= rows:
            raise InputError(
                f"model.source: the tokenizer gives the token {given}, but the model's embedding has only {rows} rows. Is this the "
                "tokenizer of another model, or were tokens added to it?"
            )
    types = base.config.token_types if isinstance(base, Encoder) else 0
    kind = max((int(t.max()) for examples in data.parts for t in examples.types or ()), default=0)
    if types and kind >= types:
        raise InputError(f"model.source: the tokenizer gives token types 0 to {kind}, but the model has only {types}.")
    if known and data.classes is not None and len(known) != len(data.classes):
        raise InputError(f"task.labels: {len(data.classes)} classes; the model's head has {len(known)}: {', '.join(known)}.")


def _plan(config: Config, data: TaskData, mesh: Mesh) -> BatchPlan | EpisodePlan | PromptPlan:
    training = config.training
    if (collected := data.collected) is not None:
        defaults, why = TrainingConfig.model_fields, f"not with task.kind '{config.task.kind}', whose members make their own batches."
        for key in ("batch_size", "accumulate", "batching"):
            if getattr(training, key) != defaults[key].default and key not in collected.given:
                raise InputError(f"training.{key}: {why}")
        if training.steps is None and "epochs" not in collected.given:
            raise InputError(f"training.epochs: {why} Give training.steps.")
        for axis in () if collected.cut else ("data", "fsdp"):
            if mesh.shape[axis] > 1:
                raise InputError(f"mesh.{axis}: {why} mesh.sweep splits the members.")
        return collected.plan(data.parts, training.model_dump(), row_multiple=mesh.shape["data"] * mesh.shape["fsdp"])
    if config.model.train_batch_stats and training.batch_size // training.accumulate % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise InputError(
            "model.train_batch_stats: no row of a batch may be empty: training.batch_size must divide by mesh.data x mesh.fsdp."
        )
    return data.batches(
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
        test=data.test,
    )


def place_model(model: nnx.Module, mesh: Mesh) -> None:
    """Moves a model's weights to their places on the mesh, by their logical axes; in place."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Variable):
            axes = variable.get_metadata().get(AXES, (None,) * variable.ndim)
            variable.set_value(place(variable[...], parameter_sharding(mesh, variable.shape, axes)))


def check_adapters(setup: Setup, configs: Sequence[Config]) -> None:
    """`InputError` unless the configs' adapters fit the model; nothing is compiled or kept.

    Args:
        setup: what the configs share.
        configs: members of one pack.
    """
    inject_layout(setup.model, setup.layout(configs))
