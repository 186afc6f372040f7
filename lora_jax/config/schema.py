"""The typed config: one YAML file, one `Config`. The descriptions of fields appear in the JSON schema."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .doors import METHODS, OPTIMIZERS, SECTION_LISTS, TASKS, TRANSFORMS, OneOf
from .patterns import what_is_wrong
from .types import (
    SOURCE,
    Bytes,
    DataSeed,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Points,
    PositiveFloat,
    PositiveInt,
    Rank,
    Section,
    Seed,
    Steps,
    TaskSection,
)
from .types import TaskConfig as TaskConfig  # tasks take it from here


class Distribution(Section):
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value, uniformly distributed. Whole numbers if the key holds whole numbers."
    )
    log_uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value, uniformly distributed on a logarithmic scale."
    )
    choice: list[Any] | None = Field(default=None, description="One of these values, with equal probability.")

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        if sum(v is not None for v in (self.uniform, self.log_uniform, self.choice)) != 1:
            raise ValueError("give exactly one of 'uniform', 'log_uniform' and 'choice'")
        bounds = self.uniform or self.log_uniform
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"the lowest value ({bounds[0]}) must be below the highest ({bounds[1]})")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError(f"the values of 'log_uniform' must be above 0, got {self.log_uniform[0]}")
        if self.choice is not None and not self.choice:
            raise ValueError("'choice' has no values")
        return self


class RandomConfig(Section):
    count: Points = Field(description="Number of points to draw. Raising it keeps the earlier points.")
    seed: DataSeed = Field(default=0, description="Seed of the draws.")
    keys: dict[str, Distribution] = Field(description="Dotted config key -> {uniform: [a, b]}, {log_uniform: [a, b]} or {choice: [...]}.")


class HalvingConfig(Section):
    metric: str | None = Field(
        default=None,
        description="The held-out metric of the task that ranks members at a rung. Default: the task's primary metric.",
    )
    factor: Annotated[float, Field(gt=1)] = Field(default=2.0, description="At each rung, one in `factor` members continues.")
    rungs: Annotated[int, Field(gt=0, le=100)] | list[Steps] = Field(
        description="Number of rungs, the last at 1 / factor of the steps and each at 1 / factor of the next; or a list of steps."
    )

    @model_validator(mode="after")
    def _rungs(self) -> HalvingConfig:
        if isinstance(self.rungs, list) and (not self.rungs or any(a >= b for a, b in itertools.pairwise(self.rungs))):
            raise ValueError(f"'rungs' must be increasing steps, got {self.rungs}")
        return self


class SweepConfig(Section):
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Dotted config key -> values. Members are all combinations.")
    zip: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Dotted config key -> values that are combined by position: the first of each, the second of each, ...",
    )
    random: RandomConfig | None = Field(default=None, description="Points drawn at random.")
    members: list[dict[str, Any]] = Field(
        default_factory=list, description="Single members, each a mapping of dotted config keys to values."
    )
    seeds: Points | list[Seed] | None = Field(
        default=None, description="Repeat each point with several values of training.seed: a number of seeds, or a list."
    )
    where: str | None = Field(
        default=None,
        description="A condition that members must satisfy, such as: rank <= 8 or targets != 'mlp'. Keys go by their last part.",
    )
    reference: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Swept key -> value. Tables compare each member with the one that has these values and otherwise the same settings. "
            "Default: with the best member."
        ),
    )
    halving: HalvingConfig | None = Field(default=None, description="Successive halving: only the best members of each rung continue.")
    max_pack: PositiveInt = Field(default=16, description="Maximal number of members in one compiled step.")
    max_padding: Fraction = Field(
        default=0.25,
        description=(
            "Maximal fraction of a pack's time, compiling included, spent on padding: ranks above a member's own, sites it does not "
            "adapt, layers below its lowest. Members that differ more train in separate packs."
        ),
    )
    memory_limit: Bytes | None = Field(
        default=None,
        description="Memory limit of a pack on a device: bytes or a size such as 8GB. Default: the device's memory, and no limit on a CPU.",
    )

    @field_validator("grid", "zip")
    @classmethod
    def _values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for key, values in value.items():
            if not values:
                raise ValueError(f"'{key}' has no values")
        return value

    @model_validator(mode="after")
    def _space(self) -> SweepConfig:
        if not (self.grid or self.zip or self.random or self.members or self.seeds):
            raise ValueError("has no key to sweep over: give a 'grid', 'zip', 'random', 'members' or 'seeds'")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                "'zip' needs the same number of values for each key, got " + ", ".join(f"{k}: {n}" for k, n in lengths.items())
            )
        parts = [*self.grid, *self.zip, *(self.random.keys if self.random else ()), *(["training.seed"] if self.seeds else ())]
        twice = next((key for key in parts if parts.count(key) > 1), None)
        if twice:
            raise ValueError(f"'{twice}' is swept in two ways")
        return self


class TransformConfig(Section):
    """What the sections of all base transforms have in common; each transform's own adds its keys (`models/transforms/`)."""

    kind: str = Field(description="Which transform.")


class ModelConfig(Section):
    # Its transforms are known when the first config is read, and may become more.
    model_config = ConfigDict(defer_build=True)

    source: str = Field(
        description="A Hugging Face folder, a .gguf or .safetensors file, hf://org/name[@revision], or package://import_name/path.",
        json_schema_extra=SOURCE,
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the base's weights and matmuls. Adapters stay float32."
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="dots",
        description=(
            "Rematerialisation. What each layer keeps for the backward pass: everything but weight slices (none), "
            "matmul results (dots), or only its input (full)."
        ),
    )
    scan_layers: bool = Field(
        default=True,
        description=(
            "Run the layers as one loop, compiled once. false: compile each layer separately. A step then takes about a tenth less time "
            "on CPUs, but compile time grows with depth, and a copy of the layers' weights may be held during a step. "
            "A mesh that shards the weights always uses the loop."
        ),
    )
    dropout: Fraction = Field(
        default=0.0,
        description="Dropout of the base during training (embeddings, attention, outputs of sublayers). Shared by all members.",
    )
    quantized: Literal["dequantize", "keep"] = Field(
        default="dequantize",
        description=(
            "What becomes of weights that the file holds quantised (blocks of GGUF, float8 with scales): dequantised when they are read, "
            "or kept in memory as they are and dequantised a layer at a time where they are used."
        ),
    )
    train_batch_stats: bool = Field(
        default=False,
        description=(
            "Batch norms normalise training batches by their own mean and variance and go on with their running statistics, as in "
            "PyTorch's train mode. Each member keeps running statistics of its own. false: they use those of the checkpoint throughout."
        ),
    )
    transforms: list[Annotated[TransformConfig, SECTION_LISTS["model", "transforms"]]] = Field(
        default_factory=list,
        description="What is done to the base once it is loaded, in this order: [{kind: ..., ...}]; each kind has keys of its own.",
    )

    @field_validator("transforms")
    @classmethod
    def _transforms(cls, value: list[TransformConfig]) -> list[TransformConfig]:
        kinds = [section.kind for section in value]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice is not None:
            raise ValueError(f"lists '{twice}' twice")
        return value


class AdapterConfig(Section):
    """What the sections of all methods have in common; each method's own adds its keys (`adapters/methods/`)."""

    method: str = Field(default="lora", description="The adaptation method. Each method has its own keys.")
    rank: Rank = Field(default=8, description="Rank r of the update.")
    alpha: PositiveFloat = Field(default=16.0, description="The update is scaled by alpha / rank.")
    targets: str | list[str] = Field(
        default="attention",
        description=(
            "Modules to adapt: a preset (attention, mlp, all-linear, convolutions, embedding, experts), a list of names (each matches "
            "modules whose path ends with it), or a regex for the full path."
        ),
    )
    exclude: str | list[str] | None = Field(default=None, description="Modules to exclude, in the same forms as targets.")
    layers: int | str | list[int] | None = Field(
        default=None, description="Layers to adapt: 3, [0, 5], '2-5', 'last:4', joined by commas; 'encoder:2-5' of a stack. Default: all."
    )
    rank_pattern: dict[str, Rank] = Field(default_factory=dict, description="Regex -> rank, for modules whose path ends with a match.")
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Regex -> alpha, for modules whose path ends with a match."
    )
    dropout: Fraction = Field(default=0.0, description="Dropout of the input of A during training.")
    nested_init: bool = Field(
        default=True,
        description="At one seed, start a smaller rank with the leading part of a larger rank's factors. false: each rank draws its own.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Biases of the base to train.")
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules of the base to train in full, in all layers (names as in a list of targets)."
    )

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("must name at least one target")
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:
            if (why := what_is_wrong(pattern)) is not None:
                raise ValueError(f"'{pattern[:60]}' {why}")
        return value


class InitConfig(Section):
    """What the sections of all inits have in common; each init's own adds its keys (`adapters/inits/`)."""

    kind: str = Field(description="Which init.")


class OptimizerConfig(Section):
    """What the sections of all optimizers have in common; each optimizer's own adds its keys (`training/optimizers/`)."""

    kind: str = Field(default="adamw", description="Which optimizer. Each kind has its own keys.")
    learning_rate: PositiveFloat = Field(default=1e-3, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Learning rate after warm-up: linear decay to 0, cosine decay to 0, or constant."
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear warm-up from 0.")
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="Weight decay, times the learning rate, of all but norms and biases (sgd: added to the gradient)."
    )
    clip_norm: PositiveFloat | None = Field(default=None, description="Clip the gradient to this global norm.")
    b_lr_ratio: PositiveFloat = Field(default=1.0, description="LoRA+ (arXiv:2402.12354): ratio of B's learning rate to A's.")
    head_lr_ratio: PositiveFloat = Field(default=1.0, description="Ratio of the head's learning rate to A's.")


class TrainingConfig(Section):
    steps: Steps | None = Field(default=None, description="Number of optimizer steps. Give either steps or epochs.")
    epochs: Annotated[PositiveFloat, Field(le=1e6)] | None = Field(
        default=None, description="Passes over the training rows. Give either steps or epochs."
    )
    batch_size: Steps = Field(default=32, description="Examples per optimizer step.")
    accumulate: PositiveInt = Field(
        default=1, description="Micro-batches per optimizer step (gradient accumulation); must divide batch_size."
    )
    batching: Literal["packed", "padded"] = Field(
        default="packed", description="packed: several examples per row, separated by segment ids. padded: one example per row."
    )
    seed: Seed = Field(default=0, description="Seed of the factors, the head and dropout. Members may differ in it.")
    data_seed: DataSeed = Field(
        default=0, description="Seed of the order of the training rows and of the base's dropout. Shared by all members of a pack."
    )
    pack: Literal["auto", "vmap", "scan", "chunk"] = Field(
        default="auto",
        description=(
            "How one program runs the members of a pack: side by side (vmap), one after the other in the memory of one (scan), "
            "or `chunk` members at a time (chunk). auto measures the modes on the device, "
            "and scans where each member needs arrays of the weights' size."
        ),
    )
    chunk: PositiveInt = Field(default=4, description="Number of members that run side by side with pack: chunk.")
    eval_every: NonNegativeInt = Field(
        default=0, description="Steps between evaluations. The last step is always evaluated; 0: only the last step."
    )
    cache_trunk: Literal["off", "on"] = Field(
        default="off",
        description=(
            "Compute the layers below the lowest adapted one once for each example, for all epochs, evaluations and packs. "
            "The losses keep their bits."
        ),
    )
    trunk_memory_gb: NonNegativeFloat = Field(
        default=1.0, description="The trunk cache is kept in memory if it is no larger than this; else in a file."
    )
    trunk_disk_gb: NonNegativeFloat = Field(
        default=20.0, description="Most that files of trunk caches take below tracking.dir; those used longest ago are removed. 0: none."
    )
    extend_steps: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="Additional optimizer steps after 'steps' or 'epochs'. Raise it to extend a finished run."
    )

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.batch_size % self.accumulate:
            raise ValueError(f"'accumulate' ({self.accumulate}) must divide 'batch_size' ({self.batch_size})")
        return self


class MeshConfig(Section):
    data: int = Field(default=1, description="Devices that split the batch. -1: all remaining devices.")
    fsdp: int = Field(default=1, description="Devices that split the base and the batch. -1: all remaining devices.")
    tensor: int = Field(default=1, description="Devices that split attention heads and hidden units. -1: all remaining devices.")
    sweep: int = Field(default=1, description="Devices that split the members of a pack. -1: all remaining devices.")

    @model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = (self.data, self.fsdp, self.tensor, self.sweep)
        if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError("each axis must be a positive number, and at most one may be -1")
        return self


class TrackingConfig(Section):
    dir: str = Field(default="runs", description="Parent of the run directories.")
    log_every: PositiveInt = Field(default=10, description="Steps between logged scalars.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events.")
    save: Literal["best", "final", "both", "none"] = Field(default="both", description="Adapters of each member to save.")
    checkpoint_every: NonNegativeInt = Field(
        default=100, description="Steps between checkpoints. 0: only at the end and when the run is stopped."
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="Number of newest checkpoints to keep.")
    profile: NonNegativeInt = Field(
        default=0, description="Number of steps to trace for TensorBoard's profiler, from the third step on. 0: none."
    )
    compile_cache: bool = Field(
        default=True,
        description=(
            "Keep compiled programs below tracking.dir/.jax-cache (at most 2 GB; the least recently used are removed), "
            "so that a plan, its run and a resume compile each of them once."
        ),
    )


class Config(Section):
    """One experiment."""

    # Methods, optimizers and tasks bring their sections when the first config is read; more can be registered later.
    model_config = ConfigDict(defer_build=True)

    name: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run directory.")]
    model: ModelConfig
    task: Annotated[TaskSection, OneOf(TASKS, "kind")]
    adapter: Annotated[AdapterConfig, OneOf(METHODS, "method", "lora")] = Field(default_factory=dict, validate_default=True)
    optimizer: Annotated[OptimizerConfig, OneOf(OPTIMIZERS, "kind", "adamw")] = Field(default_factory=dict, validate_default=True)
    training: TrainingConfig
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    sweep: SweepConfig | None = None


# A model's section is rebuilt first: the whole config's takes it as it finds it.
TRANSFORMS.on_change(lambda: ModelConfig.model_rebuild(force=True))
for _door in (METHODS, OPTIMIZERS, TASKS, TRANSFORMS):
    _door.on_change(lambda: Config.model_rebuild(force=True))
