"""The typed config: one YAML file, one `Config`. Every field's description is what the JSON schema shows in an editor."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from .doors import METHODS, SECTION_LISTS, TASKS, TRANSFORMS, OneOf
from .sweep import SweepConfig
from .types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class TransformConfig(Section):
    """What the sections of all base transforms have in common; each transform's own adds its keys (`models/transforms/`)."""

    kind: str = Field(description="Which transform.")


class ModelConfig(Section):
    # Its transforms are known when the first config is read, and may become more.
    model_config = ConfigDict(defer_build=True)

    source: str = Field(
        description="A Hugging Face folder, a .gguf or .safetensors file, hf://org/name[@revision], or package://import_name/path."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="The base's weights and matmuls; adapters stay float32.")
    remat: Literal["none", "dots", "full"] = Field(
        default="dots",
        description=(
            "What each layer keeps for the backward pass: everything but weight slices (none), "
            "matmul results (dots), or only its input (full)."
        ),
    )
    scan_layers: bool = Field(
        default=True,
        description=(
            "One loop over the layers, compiled once for all. false: each is compiled by itself, and a step takes about a tenth less "
            "time on CPUs, but compiling more with depth, and a copy of the layers' weights may be held while a step runs. "
            "(Where a mesh cuts the weights up it is a loop all the same.)"
        ),
    )
    dropout: Fraction = Field(
        default=0.0,
        description="The base's own dropout while training: embeddings, attention, sub-layers' outputs. The same for all members.",
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


class TaskConfig(Section):
    """What the sections of all tasks have in common; each task's own adds its keys (`tasks/`)."""

    kind: str = Field(description="What is learned; each kind of task has keys of its own.")
    source: str = Field(
        description="A .csv/.tsv/.jsonl/.parquet/.txt file (also .gz, .bz2), a folder, hf://org/name[@revision], or package://import_name/path."
    )
    eval_source: str | None = Field(
        default=None, description="A separate held-out file; without it `eval_size` rows of `source` are held out."
    )
    eval_size: PositiveInt = Field(
        default=500, description="How many rows are held out (with `eval_source`: how many of its rows are used)."
    )
    train_size: PositiveInt | None = Field(
        default=None, description="Use only this many training rows (after the shuffle); all by default."
    )
    split_seed: NonNegativeInt = Field(default=0, description="Seed of the train / held-out split.")
    max_length: PositiveInt = Field(default=128, description="Examples are cut to this many tokens.")
    drop: dict[str, list[str]] = Field(default_factory=dict, description="Rows to leave out: column -> values.")


class AdapterConfig(Section):
    """What the sections of all methods have in common; each method's own adds its keys (`adapters/methods/`)."""

    method: str = Field(default="lora", description="How the base is adapted; each method has keys of its own.")
    rank: PositiveInt = Field(default=8, description="Rank r of the update.")
    alpha: PositiveFloat = Field(default=16.0, description="The update is scaled by alpha / rank.")
    targets: str | list[str] = Field(
        default="attention",
        description=(
            "A preset (attention, mlp, all-linear, embedding, experts), a list of names (a name matches a module whose path ends with it), "
            "or a regex matched against the full path."
        ),
    )
    exclude: str | list[str] | None = Field(default=None, description="Sites to leave out; same forms as targets.")
    layers: int | str | list[int] | None = Field(
        default=None, description="Layer indices: 3, [0, 5], '2-5', 'last:4', 'first:2', or comma-joined; all by default."
    )
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict, description="regex -> rank, for sites whose path ends with a match.")
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="regex -> alpha, for sites whose path ends with a match."
    )
    dropout: Fraction = Field(default=0.0, description="Dropout on the input of A while training.")
    nested_init: bool = Field(
        default=True,
        description="With one seed, a smaller rank starts as the leading part of a larger one; false: each rank draws its own.",
    )
    bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Which biases of the base train too.")
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules of the base trained in full, in all layers (names as in a list of targets)."
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
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return value


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = Field(default=1e-3, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="After warm-up: down to 0 linearly, along a half cosine, or flat."
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear warm-up from 0.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="AdamW's decoupled weight decay.")
    b1: Fraction = Field(default=0.9, description="Decay of the first moment.")
    b2: Fraction = Field(default=0.999, description="Decay of the second moment.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    clip_norm: PositiveFloat | None = Field(default=None, description="Clip the gradient to this global norm.")
    b_lr_ratio: PositiveFloat = Field(default=1.0, description="LoRA+ (arXiv:2402.12354): B's learning rate over A's.")
    head_lr_ratio: PositiveFloat = Field(default=1.0, description="The head's learning rate over A's.")


class TrainingConfig(Section):
    steps: PositiveInt | None = Field(default=None, description="Optimizer steps; or give epochs.")
    epochs: PositiveFloat | None = Field(default=None, description="Passes over the training rows; or give steps.")
    batch_size: PositiveInt = Field(default=32, description="Examples in an optimizer step.")
    accumulate: PositiveInt = Field(default=1, description="Micro-batches an optimizer step is cut into; divides batch_size.")
    batching: Literal["packed", "padded"] = Field(
        default="packed", description="Several examples a row, kept apart by segment ids; or one example a row."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of the factors, the head and dropout; may differ between members.")
    data_seed: NonNegativeInt = Field(
        default=0, description="Seed of the order of the training rows and of the base's dropout; the same for all members of a pack."
    )
    pack: Literal["auto", "vmap", "scan", "chunk"] = Field(
        default="auto",
        description=(
            "How one program runs the members of a pack: side by side (vmap), one after the other in the memory of one (scan), "
            "or some at a time (chunk); auto measures on the device at hand."
        ),
    )
    chunk: PositiveInt = Field(default=4, description="Members that run side by side in the mode chunk.")
    eval_every: NonNegativeInt = Field(default=0, description="Evaluate every this many steps (and always at the end); 0: only at the end.")
    cache_prefix: Literal["off", "on"] = Field(
        default="off",
        description=(
            "Compute the layers below the lowest adapted one once for each example, for all epochs, evaluations and packs. "
            "The losses keep their bits."
        ),
    )
    cache_memory_gb: NonNegativeFloat = Field(
        default=1.0, description="The prefix cache is kept in memory if it is no larger than this; else in a file."
    )
    cache_disk_gb: NonNegativeFloat = Field(
        default=20.0, description="Most that files of prefix caches take below tracking.dir; those used longest ago are removed. 0: none."
    )
    extend_steps: NonNegativeInt = Field(
        default=0, description="Optimizer steps beyond 'steps' or 'epochs'; raised later, it takes a finished run further."
    )

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of 'steps' and 'epochs'")
        if self.batch_size % self.accumulate:
            raise ValueError(f"'accumulate' ({self.accumulate}) must divide 'batch_size' ({self.batch_size})")
        return self


class MeshConfig(Section):
    data: int = Field(default=1, description="Devices along the batch; -1 takes the rest.")
    fsdp: int = Field(default=1, description="Devices the base is cut over (and the batch too); -1 takes the rest.")
    tensor: int = Field(default=1, description="Devices heads and hidden units are cut over; -1 takes the rest.")
    sweep: int = Field(default=1, description="Devices the members of a pack are spread over; -1 takes the rest.")

    @model_validator(mode="after")
    def _sizes(self) -> MeshConfig:
        sizes = (self.data, self.fsdp, self.tensor, self.sweep)
        if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
            raise ValueError("each axis is a positive number, and at most one is -1")
        return self


class TrackingConfig(Section):
    dir: str = Field(default="runs", description="Run directories are made below it.")
    log_every: PositiveInt = Field(default=10, description="Steps between logged scalars.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events.")
    save: Literal["best", "final", "both", "none"] = Field(default="both", description="Which adapters of each member are kept.")
    checkpoint_every: NonNegativeInt = Field(
        default=100, description="Steps between checkpoints to resume from; 0: only at the end and when the run is told to stop."
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="How many of the newest checkpoints are kept.")
    profile: NonNegativeInt = Field(default=0, description="Trace this many steps, from the third on, for TensorBoard's profiler; 0: none.")


class Config(Section):
    """One experiment."""

    # The sections of methods and tasks are known when the first config is read, and may become more.
    model_config = ConfigDict(defer_build=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run directory.")]
    model: ModelConfig
    task: Annotated[TaskConfig, OneOf(TASKS, "kind")]
    adapter: Annotated[AdapterConfig, OneOf(METHODS, "method", "lora")] = Field(default_factory=dict, validate_default=True)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    sweep: SweepConfig | None = None


# A model's section is rebuilt first: the whole config's takes it as it finds it.
TRANSFORMS.on_change(lambda: ModelConfig.model_rebuild(force=True))
for _door in (METHODS, TASKS, TRANSFORMS):
    _door.on_change(lambda: Config.model_rebuild(force=True))
