"""The typed config: one YAML file, one `Config`. Every field's description is what the JSON schema shows in an editor."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from .sizes import to_bytes

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Bytes = Annotated[
    int, BeforeValidator(to_bytes), WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]})
]


class Section(BaseModel):
    """A part of the config: unknown keys are errors and values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelConfig(Section):
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
    dropout: Fraction = Field(
        default=0.0,
        description="The base's own dropout while training: embeddings, attention, sub-layers' outputs. The same for all members.",
    )


# Which kinds of task have these keys.
_COLUMNS_OF = {
    "text": ("classification", "token_classification", "causal_lm", "distillation"),
    "label": ("classification", "token_classification"),
    "labels": ("classification", "token_classification"),
    "label_words": ("classification",),
    "prompt": ("causal_lm",),
    "response": ("causal_lm",),
    "messages": ("causal_lm",),
    "question": ("question_answering",),
    "context": ("question_answering",),
    "answers": ("question_answering",),
}


class TaskConfig(Section):
    kind: Literal["classification", "token_classification", "question_answering", "causal_lm", "distillation"] = Field(
        description="What is learned: a class for each text or word, where a text answers a question, the next token, or hidden states."
    )
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
    head: Literal["new", "loaded"] = Field(
        default="new",
        description="Of classes or answers: new, drawn by the member's seed; or the one that the model was saved with, classes and all.",
    )
    text: str | None = Field(
        default=None,
        description="Text column (classification; plain-text causal_lm; distillation), or words (token_classification): a list or a text.",
    )
    teacher: str | None = Field(
        default=None,
        description=(
            "Distillation: the model whose last hidden states are to be met at each token (forms as model.source); of the same "
            "vocabulary and width. The loss is the mean squared error."
        ),
    )
    label: str | None = Field(default=None, description="Label column (classification), or the words' labels (token_classification).")
    labels: list[str] | None = Field(default=None, description="Class names in order; by default those found in the data, sorted.")
    label_words: list[str] | None = Field(
        default=None, description="Decoder classification: the word that stands for each class; the class names by default."
    )
    template: str = Field(default="{text}\nAnswer:", description="Decoder classification: the prompt around {text}.")
    pooling: Literal["cls", "mean"] = Field(
        default="cls", description="Encoder classification: the first token (through BERT's pooler), or the mean of all."
    )
    prompt: str | None = Field(default=None, description="Prompt column (causal_lm); its tokens carry no loss.")
    response: str | None = Field(default=None, description="Response column (causal_lm); the loss is on its tokens.")
    question: str | None = Field(default=None, description="Question column (question_answering).")
    context: str | None = Field(default=None, description="Column of the texts that hold the answers (question_answering).")
    answers: str | None = Field(
        default=None, description="Answer column (question_answering): {text: [...], answer_start: [...]} as SQuAD has it, or a text."
    )
    stride: NonNegativeInt = Field(
        default=32, description="question_answering: a context too long for max_length is read in windows that share so many tokens."
    )
    max_answer: PositiveInt = Field(default=30, description="question_answering: tokens of an answer at the most.")
    messages: str | None = Field(
        default=None, description="Chat-messages column (causal_lm): [{role, content}], through the chat template, loss on the assistant."
    )

    @model_validator(mode="after")
    def _columns(self) -> TaskConfig:
        if (self.teacher is not None) != (self.kind == "distillation"):
            raise ValueError("'teacher' and kind: distillation go together")
        for name, kinds in _COLUMNS_OF.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"'{name}' belongs to kind: {' or '.join(', '.join(kinds).rsplit(', ', 1))}")
        if self.head == "loaded" and self.kind in ("causal_lm", "distillation"):
            raise ValueError("'head: loaded' belongs to kind: classification, token_classification or question_answering")
        if self.kind == "question_answering":
            if self.question is None or self.context is None or self.answers is None:
                raise ValueError("question_answering needs 'question', 'context' and 'answers' (column names)")
            return self
        if self.kind == "token_classification":
            if self.text is None or self.label is None:
                raise ValueError("token_classification needs both 'text' and 'label' (columns of words and of their labels)")
            return self
        if self.kind == "classification":
            if self.text is None or self.label is None:
                raise ValueError("classification needs both 'text' and 'label' (column names)")
            if "{text}" not in self.template:
                raise ValueError("'template' must contain {text}")
            if self.label_words and self.labels and len(self.label_words) != len(self.labels):
                raise ValueError(f"'label_words' has {len(self.label_words)} entries, 'labels' has {len(self.labels)}")
            return self
        ways = [self.text is not None, self.prompt is not None or self.response is not None, self.messages is not None]
        if self.kind == "distillation" and self.text is None:
            raise ValueError("distillation needs 'text' (a column name)")
        if sum(ways) != 1:
            raise ValueError("causal_lm needs exactly one of: 'text', 'prompt' with 'response', 'messages'")
        if (self.prompt is None) != (self.response is None):
            raise ValueError("'prompt' and 'response' go together")
        return self


class AdapterConfig(Section):
    method: Literal["lora", "full", "head"] = Field(default="lora", description="LoRA, or a baseline: full fine-tuning, or only the head.")
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
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) (arXiv:2312.03732) in place of alpha / rank.")
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


class Distribution(Section):
    uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="Lowest and highest value; whole numbers for keys that hold such."
    )
    log_uniform: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="The same, evenly on a logarithmic scale."
    )
    choice: list[Any] | None = Field(default=None, description="One of these, each as likely.")

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
    count: PositiveInt = Field(description="How many points are drawn; more of them keep the ones before.")
    seed: NonNegativeInt = Field(default=0, description="Seed of the draws.")
    keys: dict[str, Distribution] = Field(description="Dotted config key -> {uniform: [a, b]}, {log_uniform: [a, b]} or {choice: [...]}.")


class HalvingConfig(Section):
    metric: Literal["loss", "accuracy", "f1", "exact_match"] | None = Field(
        default=None, description="What members are ranked by at a rung, on the held-out rows; the task's own by default."
    )
    factor: Annotated[float, Field(gt=1)] = Field(default=2.0, description="At each rung one member in so many goes on.")
    rungs: PositiveInt | list[PositiveInt] = Field(
        description="How many rungs, the last at 1 / factor of the steps and each at 1 / factor of the next; or the steps themselves."
    )

    @model_validator(mode="after")
    def _rungs(self) -> HalvingConfig:
        if isinstance(self.rungs, list) and (not self.rungs or any(a >= b for a, b in itertools.pairwise(self.rungs))):
            raise ValueError(f"'rungs' must be steps that rise, got {self.rungs}")
        return self


class SweepConfig(Section):
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="Dotted config key -> values; all combinations.")
    zip: dict[str, list[Any]] = Field(
        default_factory=dict, description="Dotted config key -> values that go together: the first of each, the second of each, ..."
    )
    random: RandomConfig | None = Field(default=None, description="Points drawn at random.")
    members: list[dict[str, Any]] = Field(default_factory=list, description="Single members: dotted config key -> value for each.")
    seeds: PositiveInt | list[NonNegativeInt] | None = Field(
        default=None, description="Each point once a seed: so many from training.seed on, or these."
    )
    where: str | None = Field(
        default=None, description="Only members for which this holds, such as: rank <= 8 or targets != 'mlp'. Keys by their last part."
    )
    reference: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Swept key -> value: tables compare each member with the one that has these values and is else the same; "
            "by default with the best."
        ),
    )
    halving: HalvingConfig | None = Field(default=None, description="Successive halving: the losers of each rung stop.")
    max_pack: PositiveInt = Field(default=16, description="Most members trained inside one compiled step.")
    max_padding: Fraction = Field(
        default=0.25,
        description=(
            "Most of a pack's time, compiling included, that may go to what a member has not: ranks above its own, sites it does not "
            "adapt, layers below its lowest. Members further apart train in packs of their own."
        ),
    )
    memory_limit: Bytes | None = Field(
        default=None,
        description="Memory a pack may take on a device: bytes or a size such as 8GB; the device's own by default, none on a CPU.",
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
            raise ValueError("names no key to sweep over: give a 'grid', 'zip', 'random', 'members' or 'seeds'")
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError("'zip' needs as many values for each key, got " + ", ".join(f"{k}: {n}" for k, n in lengths.items()))
        parts = [*self.grid, *self.zip, *(self.random.keys if self.random else ()), *(["training.seed"] if self.seeds else ())]
        twice = next((key for key in parts if parts.count(key) > 1), None)
        if twice:
            raise ValueError(f"'{twice}' is swept in two ways")
        return self


class Config(Section):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the run directory.")]
    model: ModelConfig
    task: TaskConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig
    mesh: MeshConfig = Field(default_factory=MeshConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    sweep: SweepConfig | None = None
