"""Running a plan: packs one after the other over one loaded base, every member recorded as it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..config.errors import RunError
from ..config.load import dump_config
from ..config.schema import Config
from ..tracking import MemberResult, MemberWriter, NullWriter, Progress, RunDirectory
from ..training.adapter_files import save_adapter
from ..training.checkpoints import PackCheckpoints
from ..training.loop import Outcome, perplexity, train_pack
from ..training.pack import Pack
from ..training.profile import StepTrace
from ..training.setup import Preparer, Setup, check_adapters
from ..training.stopping import StopSignals
from .members import Member, members_of
from .plan import PackPlan, plan_packs


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """A finished run: its directory, the members' results in the sweep's order, and how many programs were compiled."""

    path: Path
    results: list[MemberResult]
    compiled_programs: int


def run_sweep(config: Config, *, solo: bool = False, fresh: bool = False, progress: Progress | None = None) -> SweepOutcome:
    """Trains every member of a config that has not finished yet.

    Args:
        config: with or without a `sweep`; without one it is a single member.
        solo: train each member alone, to check the packed results against.
        fresh: set an old run of this name aside in place of resuming it.
        progress: the console; silent by default.

    Raises:
        InputError: the config, the data or the model will not do, or the run directory holds another config.
        RunError: a program was compiled more than once, or the disk is full.
        Stopped: the process was told to stop; the same call goes on from there.
    """
    with StopSignals() as signals:
        try:
            return _run(config, signals, solo=solo, fresh=fresh, progress=progress or Progress(enabled=False))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f" at {error.filename}" if error.filename else ""
            raise RunError(
                f"no space left on the disk{where}. What was saved before is whole: make room, and the same command goes on from there."
            ) from error


def _run(config: Config, signals: StopSignals, *, solo: bool, fresh: bool, progress: Progress) -> SweepOutcome:
    began = time.perf_counter()
    members = members_of(config)
    prepare = Preparer()

    def open_run() -> RunDirectory:
        return RunDirectory.open(config.tracking.dir, config.name, dump_config(config), fresh=fresh)

    # An old run is resumed or refused before anything is loaded. A new directory is made only when every member is known to be
    # right: wrong input leaves nothing behind that would stand in the way of the mended config.
    run = open_run() if not fresh and (Path(config.tracking.dir) / config.name).exists() else None
    try:
        packs = plan_packs(members, largest=1 if solo or config.sweep is None else config.sweep.max_pack)
        ended = dict(run.statuses) if run is not None else {}
        # A pack that ended in part is gone through again, from its last checkpoint.
        packs = [p for p in packs if any(m.name not in ended for m in p.members)]
        for pack_plan in reversed(packs):  # the first last, so that its setup is at hand for training
            configs = [m.config for m in pack_plan.members]
            check_adapters(prepare(configs[0]), configs)
        run = run or open_run()
        if run.resumed:
            progress.print(f"{run.path}: resumed, {len(ended)} of {len(members)} members are done.")
        compiled = 0
        told: Setup | None = None
        for number, pack_plan in enumerate(packs, 1):
            setup = prepare(pack_plan.members[0].config)
            if setup is not told:
                progress.print(describe_setup(pack_plan.members[0].config, setup))
                told = setup
            compiled += _run_pack(run, pack_plan, setup, signals, progress, f"pack {number}/{len(packs)}")
        done = {r.name: r for r in run.results()}
        results = [done[m.name] for m in members]
        run.write_results(results)
        if packs:  # a call that found all members done has no figures of its own
            run.write_summary({"compiled_programs": compiled, "packs": len(packs), "seconds": time.perf_counter() - began})
        outcome = SweepOutcome(run.path, results, compiled)
    finally:
        if run is not None:
            run.close()
    return outcome


def describe_setup(config: Config, setup: Setup) -> str:
    """What was loaded, in a line or two: examples, batch shape, padding."""
    facts = setup.plan.summary
    return (
        f"{config.model.source}: {len(setup.data.train.tokens):,} training and {len(setup.data.held_out.tokens):,} held-out examples, "
        f"{setup.steps} steps of {config.training.batch_size}; batches of {facts['rows']} x {facts['length']} tokens, "
        f"{100 * facts['padding_share']:.1f} % padding (one example a row: {100 * facts['dynamic_padding_share']:.0f} %)"
    )


def _run_pack(run: RunDirectory, plan: PackPlan, setup: Setup, signals: StopSignals, progress: Progress, title: str) -> int:
    """Trains one pack and records its members; returns how many programs were compiled."""
    members = plan.members
    config = members[0].config
    pack = Pack.build(setup.model, [m.config for m in members], setup.steps, setup.mesh)
    counts = [pack.parameter_count(i) for i in range(len(members))]
    progress.print(f"{title}: {len(members)} member{'s' * (len(members) > 1)}, {sum(counts):,} trained parameters; compiling")
    names = [m.name for m in members]
    tracking = config.tracking
    checkpoints = PackCheckpoints(
        run.checkpoints(names),
        names,
        setup.fingerprint,
        keep=tracking.keep_checkpoints,
        warn=lambda text: progress.print(f"warning: {text}"),
    )
    with _Recorder(run, members, counts, setup, progress, title) as recorder, contextlib.closing(checkpoints):
        signals.training = True
        outcome = train_pack(
            pack,
            setup,
            eval_every=config.training.eval_every,
            log_every=tracking.log_every,
            listener=recorder,
            checkpoints=checkpoints,
            checkpoint_every=tracking.checkpoint_every,
            stop=signals.asked,
            trace=StepTrace(run.path / "profile", tracking.profile),
        )
        recorder.finish(pack, outcome)
    signals.training = False
    return pack.programs.train.traces.count + pack.programs.evaluate.traces.count


def _mean(losses: np.ndarray) -> float:
    """The mean over members that have a loss; NaN where none has."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if finite.size else float("nan")


class _Recorder:
    """Writes what a pack's members do: TensorBoard, console, results, adapters."""

    def __init__(self, run: RunDirectory, members: Sequence[Member], counts: list[int], setup: Setup, progress: Progress, title: str):
        self.run, self.members, self.counts, self.setup = run, members, counts, setup
        self.progress, self.title = progress, title
        self.writers: list[MemberWriter | NullWriter] = []
        self.ended = False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()
        if not self.ended:
            for writer in self.writers:
                with contextlib.suppress(OSError):  # a full disk is told of already
                    writer.close("interrupted")

    def on_start(self, step: int) -> None:
        """Opens the members' event files and the progress bar."""
        if step:
            self.progress.print(f"{self.title}: goes on after step {step}")
        config = self.members[0].config
        shown = ("loss", "accuracy") if self.setup.metric == "accuracy" else ("loss", "perplexity")
        tags = [f"eval/{name}" for name in shown]
        grid = config.sweep.grid if config.sweep else {}
        for member in self.members:
            folder = self.run.member(member.name)
            if config.tracking.tensorboard:
                # What an interrupted run wrote beyond this step will be written again.
                resume_step = step if step or folder.exists() else None
                self.writers.append(MemberWriter(folder, member.settings, metrics=tags, domains=grid, resume_step=resume_step))
            else:
                self.writers.append(NullWriter())
        self.track = self._open.enter_context(self.progress.track(self.setup.steps, self.title, start=step))

    def on_train(self, step: int, metrics: dict[str, np.ndarray], tokens_per_second: float) -> None:
        """Scalars of the training steps."""
        values = {n: v for n, v in metrics.items() if n != "accuracy" or self.setup.metric == "accuracy"}
        if self.setup.metric == "loss":
            values["perplexity"] = perplexity(metrics["loss"])
        for i, writer in enumerate(self.writers):
            scalars = {f"train/{n}": float(v[i]) for n, v in values.items()}
            if tokens_per_second:
                scalars["train/tokens_per_second"] = tokens_per_second
            writer.scalars(step, scalars)
        self.track.update(step, loss=_mean(metrics["loss"]), tokens_per_second=tokens_per_second * len(self.members))

    def on_eval(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Scalars of an evaluation."""
        for i, writer in enumerate(self.writers):
            writer.scalars(step, {f"eval/{n}": float(v[i]) for n, v in metrics.items()})

    def finish(self, pack: Pack, outcome: Outcome) -> None:
        """Writes adapters, then results: a member with a result has all its files."""
        facts = self.setup.plan.summary
        for i, member in enumerate(self.members):
            status = "finished" if outcome.alive[i] else "diverged"
            folder = self.run.member(member.name)
            folder.mkdir(parents=True, exist_ok=True)
            save = member.config.tracking.save
            for kind, arrays in (("final", outcome.final_arrays), ("best", outcome.best_arrays)):
                if save in (kind, "both"):
                    save_adapter(folder / kind, pack.member_arrays(self.setup.model, i, arrays))
            self.writers[i].close(status)
            MemberResult(
                name=member.name,
                settings=member.settings,
                parameters=self.counts[i],
                status=status,
                final={n: float(v[i]) for n, v in outcome.final.items()},
                best={n: float(v[i]) for n, v in outcome.best.items()},
                best_step=int(outcome.best_step[i]),
                steps=self.setup.steps,
                seconds=outcome.total_seconds,
                tokens=outcome.tokens,
                tokens_per_second=outcome.tokens_per_second,
                padding_share=float(facts["padding_share"]),
            ).write(folder)
        self.ended = True
