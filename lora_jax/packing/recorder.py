"""Records a pack's members as they train, end or fail: TensorBoard, console, results, adapters."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..parallel.processes import is_writer
from ..tasks.evaluators import EVALUATORS
from ..tracking import MemberResult, MemberWriter, NullWriter, Progress, RunDirectory, write_atomic
from ..tracking.panels import PICTURE, confusion_png, samples_table
from ..training.adapter_files import adapter_identity, save_adapter
from ..training.evaluation import Tested
from ..training.loop import Outcome
from ..training.setup import Setup
from .pack import Member, Pack


def _mean(losses: np.ndarray) -> float:
    """The mean over members that have a loss; NaN where none has."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("nan")


def _of_member(test: Tested, index: int) -> dict[str, list[float]]:
    """A member's sums over each batch of test rows."""
    targets, losses, right = test.batches
    return {"targets": targets.tolist(), "loss": losses[:, index].tolist(), "right": right[:, index].tolist()}


class Recorder:
    """Records what a pack's members do."""

    def __init__(self, run: RunDirectory, members: Sequence[Member], counts: list[int], setup: Setup, progress: Progress, title: str):
        self.run, self.members, self.counts, self.setup = run, members, counts, setup
        self.progress, self.title = progress, title
        self.writers: list[MemberWriter | NullWriter] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._open.close()
        if kind is not None:
            for writer in self.writers:
                with contextlib.suppress(OSError):  # a full disk is told of already
                    writer.close("interrupted")

    def on_start(self, step: int) -> None:
        """Opens the members' event files and the progress bar."""
        if step:
            self.progress.print(f"{self.title}: continues after step {step}")
        config = self.members[0].config
        tags = [f"eval/{name}" for name in dict.fromkeys(("loss", self.setup.metrics.reported))]
        grid = {**config.sweep.grid, **config.sweep.zip} if config.sweep else {}
        for member in self.members:
            folder = self.run.member(member.name)
            if config.tracking.tensorboard and is_writer():
                # What an interrupted run wrote beyond this step will be written again.
                resume_step = step if step or folder.exists() else None
                self.writers.append(MemberWriter(folder, member.settings, metrics=tags, domains=grid, resume_step=resume_step))
            else:
                self.writers.append(NullWriter())
        self.track = self._open.enter_context(self.progress.track(self.setup.steps, self.title, start=step))

    def on_save(self, step: int) -> None:
        """Brings the curves to the disk: a killed run goes on behind this step."""
        for writer in self.writers:
            writer.flush()

    def on_train(self, step: int, metrics: dict[str, np.ndarray], tokens_per_second: float) -> None:
        """Scalars of the training steps."""
        values = {n: v for n, v in metrics.items() if n != "accuracy"} | self._of_training(metrics)
        for i, writer in enumerate(self.writers):
            scalars = {f"train/{n}": float(v[i]) for n, v in values.items()}
            if tokens_per_second:
                scalars["train/tokens_per_second"] = tokens_per_second
            writer.scalars(step, scalars)
        self.track.update(step, loss=_mean(metrics["loss"]), tokens_per_second=tokens_per_second * len(self.members))

    def _of_training(self, metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those metrics of training steps that evaluations have too, (members,) each: the loss, and what the task computes of means."""
        found = {"loss": metrics["loss"]}
        for name in self.setup.metrics.training:
            if (of_means := EVALUATORS.get(name, "task.kind").from_means) is not None:
                found[name] = of_means(metrics["loss"], metrics["accuracy"])
        return found

    def on_eval(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Scalars of an evaluation."""
        for i, writer in enumerate(self.writers):
            writer.scalars(step, {f"eval/{n}": v for n, v in self._numbers(metrics, i).items()})

    def on_texts(self, step: int, texts: list[list[str]]) -> None:
        """A panel of samples."""
        if (prompts := self.setup.data.held_out.prompts) is not None:
            for writer, own in zip(self.writers, texts, strict=True):
                writer.text(step, "eval/samples", samples_table(prompts.inputs, prompts.references, own))

    def on_pictures(self, step: int, pictures: list[bytes]) -> None:
        """A panel of examples with answers; the newest for the report too."""
        for member, writer, png in zip(self.members, self.writers, pictures, strict=True):
            writer.image(step, "eval/predictions", png)
            if is_writer():
                write_atomic(self.run.member(member.name) / PICTURE, png)

    def _numbers(self, metrics: dict[str, np.ndarray], index: int) -> dict[str, float]:
        """A member's metrics, without its tables."""
        return {name: float(values[index]) for name, values in metrics.items() if name not in self.setup.metrics.tables}

    def _details(self, outcome: Outcome, index: int) -> dict[str, Any]:
        """`MemberResult.details`; a table of classes by classes is drawn too."""
        data, found = self.setup.data, {}
        # A best step that an older version found has no tables.
        tables = {n: outcome.best[n][index] for n in self.setup.metrics.tables if not np.isnan(outcome.best.get(n, np.nan)).all()}
        if tables:
            found["classes"] = list(data.classes or ())
        for name, table in tables.items():
            found[name] = (table.astype(np.int64) if table.ndim > 1 else table).tolist()
            shown = isinstance(self.writers[index], MemberWriter) and table.shape == (len(data.classes or ()),) * 2
            if shown and data.classes is not None:
                self.writers[index].image(int(outcome.best_step[index]), f"eval/{name}", confusion_png(table, data.classes))
        if (prompts := data.held_out.prompts) is not None:
            of_texts = [EVALUATORS.get(name, "task.kind") for name in self.setup.metrics.held_out]
            found["signatures"] = {e.name: e.signature(prompts.references) for e in of_texts if e.signature is not None}
        return found

    def finish(self, pack: Pack, outcome: Outcome, *, stopped: Collection[str] | None = None, rung: int | None = None) -> None:
        """Writes adapters, then results: a member with a result has all its files.

        Args:
            pack: the members.
            outcome: their arrays and metrics.
            stopped: these members alone, which lost in a rung and go no further; the others are still under way.
            rung: the number of that rung, from 1.
        """
        facts, fingerprint = self.setup.plan.summary, self.setup.fingerprint  # in every process: all may hold a part of the base
        for i, member in enumerate(self.members):
            if stopped is not None and member.name not in stopped:
                self.writers[i].close("interrupted")  # it goes on in another pack, with a writer of its own
                continue
            if member.name in self.run.statuses:  # it was recorded before its pack was interrupted
                self.writers[i].close(self.run.statuses[member.name])
                continue
            status = "diverged" if not outcome.alive[i] else "finished" if stopped is None else "stopped"
            folder = self.run.member(member.name)
            save = member.config.tracking.save
            for kind, arrays in (("final", outcome.final_arrays), ("best", outcome.best_arrays)):
                if save in (kind, "both"):
                    own = pack.member_arrays(self.setup.model, i, arrays | pack.kept)  # in every process: all may hold a part of them
                    if is_writer():
                        identity = adapter_identity(fingerprint, self.setup.spec(member.config))
                        save_adapter(folder / kind, own, identity, self.setup.data.classes)
            if (test := outcome.test) is not None:
                self.writers[i].scalars(outcome.steps, {f"test/{n}": v for n, v in self._numbers(test.metrics, i).items()})
            details = self._details(outcome, i)
            self.writers[i].close(status)
            result = MemberResult(
                name=member.name,
                settings=member.settings,
                parameters=self.counts[i],
                status=status,
                final=self._numbers(outcome.final, i),
                best=self._numbers(outcome.best, i),
                train={n: float(v[i]) for n, v in self._of_training(outcome.train).items()} if outcome.train else {},
                best_step=int(outcome.best_step[i]),
                steps=outcome.steps,
                seconds=outcome.total_seconds,
                tokens=outcome.tokens,
                tokens_per_second=outcome.tokens_per_second,
                padding_share=float(facts["padding_share"]),
                metric=self.setup.metrics.reported,
                rung=rung if status == "stopped" else None,
                test={} if test is None else self._numbers(test.metrics, i),
                tested="" if test is None else "best" if test.of_best[i] else "final",
                test_batches=None if test is None else _of_member(test, i),
                details=details,
            )
            if is_writer():
                result.write(folder)


def record_failure(run: RunDirectory, members: Sequence[Member], error: Exception, progress: Progress) -> None:
    """Records members as failed: the reason in `results.json`, the traceback in `error.txt`. Members that ended before stay as they are."""
    reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    trace = "".join(traceback.format_exception(error))
    failed = [m for m in members if m.name not in run.statuses]
    for member in failed if is_writer() else []:
        folder = run.member(member.name)
        write_atomic(folder / "error.txt", trace)
        MemberResult(member.name, member.settings, parameters=0, status="failed", final={}, error=reason).write(folder)
    run.refresh()
    progress.print(f"failed: {', '.join(m.name for m in failed)}: {reason}")
