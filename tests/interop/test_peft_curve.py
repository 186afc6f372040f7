"""Training against Hugging Face PEFT: the same start, batches and AdamW give the same loss curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from flax import nnx

from lora_jax.config.schema import Config
from lora_jax.models.heads import LanguageModel, SequenceClassifier
from lora_jax.models.load import load_model
from lora_jax.packing.pack import Pack
from lora_jax.weights.load import resolve
from lora_jax.weights.tokenizer import load_tokenizer

pytestmark = pytest.mark.interop

Example = tuple[Sequence[int], int]  # tokens, class (ignored by the language model)
LENGTH, BATCH = 64, 16
# Relative, at every step. What is promised is 1e-3; but a learning rate 1 % off stays within that, and what we see is 4e-7.
TOLERANCE = 2e-5


def config(adapter: dict[str, Any], optimizer: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "name": "curve",
            "model": {"source": "-"},
            "task": {"kind": "classification", "source": "-", "text": "text", "label": "label"},
            "adapter": adapter,
            "optimizer": {"schedule": "linear", "weight_decay": 0.01, **optimizer},
            "training": {"steps": 1, "batch_size": BATCH},
        }
    )


# Batches


def our_batch(
    examples: Sequence[Example], places: Sequence[tuple[int, int]], shape: tuple[int, int], *, causal: bool
) -> dict[str, np.ndarray]:
    """One micro-batch, example i starting at `places[i]` = (row, column). Targets: its first token; for `causal` all but its last."""
    rows, length = shape
    slots = rows * length if causal else len(examples)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segment_ids")}
    batch["example_ids"] = np.full(shape, len(examples), np.int32)
    targets: list[tuple[int, int]] = []
    for i, ((tokens, label), (row, column)) in enumerate(zip(examples, places, strict=True)):
        span = slice(column, column + len(tokens))
        batch["tokens"][row, span], batch["positions"][row, span] = tokens, np.arange(len(tokens))
        batch["segment_ids"][row, span] = 1 + batch["segment_ids"][row].max()
        batch["example_ids"][row, span] = i
        start = row * length + column
        targets += [(start + j, t) for j, t in enumerate(tokens[1:])] if causal else [(start, label)]
    flat = np.zeros((2, slots), np.int32)
    flat[:, : len(targets)] = np.transpose(targets)
    weights = (np.arange(slots) < len(targets)).astype(np.float32)
    return batch | {"target_index": flat[0], "target_ids": flat[1], "target_weights": weights}


def padded_places(examples: Sequence[Example]) -> tuple[list[tuple[int, int]], int]:
    """One example a row; also the number of rows."""
    return [(i, 0) for i in range(len(examples))], len(examples)


def packed_places(examples: Sequence[Example]) -> tuple[list[tuple[int, int]], int]:
    """Each example in the first row with room; also the number of rows."""
    used: list[int] = []
    places = []
    for tokens, _ in examples:
        row = next((r for r, n in enumerate(used) if n + len(tokens) <= LENGTH), len(used))
        used += [0] * (row == len(used))
        places.append((row, used[row]))
        used[row] += len(tokens)
    return places, len(used)


def their_batch(examples: Sequence[Example], *, causal: bool) -> dict[str, Any]:
    """What a PyTorch collator makes: rows padded to the longest, an attention mask, labels (-100 where there is none)."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t, _ in examples], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(t), dtype=torch.long) for t, _ in examples], batch_first=True)
    labels = tokens.masked_fill(mask == 0, -100) if causal else torch.tensor([label for _, label in examples])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


# The two sides


def twin(theirs: Any, pack: Pack) -> Any:
    """`theirs` (a PEFT model) with the factors and classifier of our first member, whose ranks and scales it must share."""
    modules = dict(theirs.named_modules())
    trainable = {name: np.asarray(a[0]) for name, a in pack.state.trainable.items()}
    copied = 0
    with torch.no_grad():
        for site, member in pack.specs[0].sites.items():
            shape = next(s for s in pack.structure.sites if s.site.name == site)
            a, b = (trainable[f"{site}.lora_{f}"].reshape(len(member.ranks), *trainable[f"{site}.lora_{f}"].shape[-2:]) for f in "ab")
            for i, rank in enumerate(member.ranks):
                # The last of a site's names is the one it had in the checkpoint.
                (module,) = [m for n, m in modules.items() if n.endswith("." + shape.site.names[i][-1]) and hasattr(m, "lora_A")]
                assert module.scaling["default"] == pytest.approx(member.settings["scale"][i])
                assert module.lora_A["default"].weight.shape == (rank, shape.site.inputs)
                module.lora_A["default"].weight.copy_(torch.tensor(a[i][:, :rank].T.copy()))
                module.lora_B["default"].weight.copy_(torch.tensor(b[i][:rank].T.copy()))
                copied += 2
        if "classifier.kernel" in trainable:
            head = modules["base_model.model.classifier"].modules_to_save["default"]
            head.weight.copy_(torch.tensor(trainable["classifier.kernel"].T.copy()))
            head.bias.copy_(torch.tensor(trainable["classifier.bias"].copy()))
            copied += 2
    assert copied == sum(p.requires_grad for p in theirs.parameters())  # nothing of theirs kept its own start
    return theirs


def our_curve(pack: Pack, batches: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    step, state, losses = pack.programs.train, pack.state, []
    for i, batch in enumerate(batches):
        state, metrics = step(state, pack.fixed, pack.part.frozen, {k: v[None] for k, v in batch.items()}, np.int32(i))
        losses.append(float(metrics.loss[0]))
    pack.programs.check()
    return np.array(losses)


def their_curve(model: Any, batches: Sequence[dict[str, Any]], learning_rate: float) -> np.ndarray:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    model.train()  # all dropout rates are 0
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return np.array(losses)


def compare_curves(
    model: nnx.Module,
    theirs: Any,
    adapter: dict[str, Any],
    batches: Sequence[Sequence[Example]],
    places: Callable[[Sequence[Example]], tuple[list[tuple[int, int]], int]],
    *,
    learning_rate: float = 1e-3,
    causal: bool = False,
) -> None:
    pack = Pack.build(model, [config(adapter, {"learning_rate": learning_rate})], steps=len(batches))
    theirs = twin(theirs, pack)
    rows = max(places(b)[1] for b in batches)
    ours = our_curve(pack, [our_batch(b, places(b)[0], (rows, LENGTH), causal=causal) for b in batches])
    reference = their_curve(theirs, [their_batch(b, causal=causal) for b in batches], learning_rate)
    relative = np.abs(ours / reference - 1)
    print(f"loss {reference[0]:.4f} to {reference[-1]:.4f}; largest relative difference {relative.max():.1e}, at step 0 {relative[0]:.1e}")
    assert relative[0] < 1e-5
    assert relative.max() < TOLERANCE


# Classification with MiniLM


@pytest.fixture(scope="module")
def examples(minilm_source: str, reviews: list[tuple[str, int]]) -> list[Example]:
    """Tokenised reviews in a random order."""
    chosen = [reviews[i] for i in np.random.default_rng(0).permutation(len(reviews))[: 50 * BATCH]]
    tokens = load_tokenizer(minilm_source)([text for text, _ in chosen], truncation=True, max_length=LENGTH)["input_ids"]
    return [(t, label) for t, (_, label) in zip(tokens, chosen, strict=True)]


@pytest.fixture(scope="module")
def classifier(minilm_source: str) -> nnx.Module:
    return SequenceClassifier(load_model(minilm_source), 2, "cls", rngs=nnx.Rngs(0))


def their_classifier(source: str, **adapter: Any) -> Any:
    path = resolve(source, key="model.source")
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
    model = transformers.BertForSequenceClassification.from_pretrained(path, dtype=torch.float32, **no_dropout)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **adapter))


def cut(examples: Sequence[Example], steps: int) -> list[Sequence[Example]]:
    return [examples[i * BATCH : (i + 1) * BATCH] for i in range(steps)]


@pytest.mark.slow
def test_classification_curve(classifier: nnx.Module, minilm_source: str, examples: list[Example]):
    """50 steps on query and value, ours on packed rows, PEFT's on padded ones."""
    theirs = their_classifier(minilm_source, r=8, lora_alpha=16, target_modules=["query", "value"])
    adapter = {"rank": 8, "alpha": 16, "targets": ["query", "value"]}
    compare_curves(classifier, theirs, adapter, cut(examples, 50), packed_places)


@pytest.mark.long
def test_rslora_on_all_linear_with_patterns(classifier: nnx.Module, minilm_source: str, examples: list[Example]):
    ranks, alphas = {"query": 4, r"layer\.[01]\.output\.dense": 12}, {r"layer\.5\..*": 24, "pooler.dense": 8}
    theirs = their_classifier(
        minilm_source, r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas
    )
    adapter = {"rank": 8, "alpha": 16, "targets": "all-linear", "rslora": True, "rank_pattern": ranks, "alpha_pattern": alphas}
    compare_curves(classifier, theirs, adapter, cut(examples, 10), packed_places)


def test_padded_and_packed_rows_start_at_the_same_loss(classifier: nnx.Module, minilm_source: str, examples: list[Example]):
    pack = Pack.build(classifier, [config({"targets": ["query", "value"]}, {})], steps=1)
    theirs = twin(their_classifier(minilm_source, r=8, lora_alpha=16, target_modules=["query", "value"]), pack)
    batch = examples[:BATCH]
    with torch.no_grad():
        reference = float(theirs(**their_batch(batch, causal=False)).loss)
    for layout in (padded_places, packed_places):
        places, rows = layout(batch)
        rows = our_batch(batch, places, (rows, LENGTH), causal=False)
        loss, *_ = jax.jit(pack.programs.evaluate.traces.function)(pack.state.trainable, pack.fixed.settings, pack.part.frozen, rows)
        assert float(loss[0]) / BATCH == pytest.approx(reference, rel=1e-5)


# Language modelling with a small Llama


@pytest.mark.parametrize("places", [padded_places, packed_places])
def test_language_model_curve(places: Callable[..., Any], reviews: list[tuple[str, int]], tmp_path: Path):
    """Four layers of random weights, grouped-query attention, the reviews' bytes as tokens."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256, tie_word_embeddings=True, **shape))
    base.save_pretrained(tmp_path)
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets))
    examples = [(list(text.encode()[: 8 + 7 * (i % 9)]), 0) for i, (text, _) in enumerate(reviews[: 20 * BATCH])]
    model = LanguageModel(load_model(str(tmp_path)))
    assert model.base.embed.embedding[...].dtype == jnp.float32
    adapter = {"rank": 8, "alpha": 16, "targets": targets}
    compare_curves(model, theirs, adapter, cut(examples, 20), places, learning_rate=1e-2, causal=True)
