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
from ..parallel.processes import is_writer, writer_first, writer_says
from ..tracking import MemberResult, MemberWriter, NullWriter, Progress, RunDirectory, holds_run
from ..training.adapter_files import save_adapter
from ..training.checkpoints import PackCheckpoints
from ..training.loop import Outcome, perplexity, train_pack
from ..training.pack import Pack
from ..training.profile import StepTrace
from ..training.setup import Preparer, Setup, check_adapters
from ..training.stopping import StopSignals
from .members import Member, members_of
from .plan import PackPlan, Part, plan_packs, plan_part
from .remaining import plan_remaining, take_over_names


@dataclasses.dataclass(frozen=True)
class SweepOutcome:
    """A finished run.

    Attributes:
        path: its directory.
        results: of the members that have ended, in the sweep's order.
        compiled_programs: how many this process compiled.
        unfinished: members that other processes have yet to end; 0 but for a part of a sweep.
    """

    path: Path
    results: list[MemberResult]
    compiled_programs: int
    unfinished: int = 0


def run_sweep(
    config: Config,
    *,
    solo: bool = False,
    fresh: bool = False,
    many: bool = False,
    part: Part | None = None,
    progress: Progress | None = None,
) -> SweepOutcome:
    """Trains every member of a config that has not finished yet.

    Of several processes that run one program (`parallel/processes.py`), the first alone writes and speaks.

    Args:
        config: with or without a `sweep`; without one it is a single member.
        solo: train each member alone, to check the packed results against.
        fresh: set an old run of this name aside in place of resuming it; not with a part, whose run others share.
        many: whether a sweep of more than 10,000 members is meant.
        part: train this share of the members alone, while others train the rest into the same directory; the last to end writes the
            results of all.
        progress: the console; silent by default.

    Raises:
        InputError: the config, the data or the model will not do, or the run directory holds another config.
        RunError: a program was compiled more than once, or the disk is full.
        Stopped: the process was told to stop; the same call goes on from there.
    """
    with StopSignals() as signals:
        try:
            return _run(
                config,
                members_of(config, many=many),
                signals,
                solo=solo,
                fresh=fresh,
                part=part,
                progress=progress or Progress(enabled=False),
            )
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f" at {error.filename}" if error.filename else ""
            raise RunError(
                f"no space left on the disk{where}. What was saved before is whole: make room, and the same command goes on from there."
            ) from error


def _run(
    config: Config, members: list[Member], signals: StopSignals, *, solo: bool, fresh: bool, part: Part | None, progress: Progress
) -> SweepOutcome:
    began = time.perf_counter()
    largest = 1 if solo or config.sweep is None else config.sweep.max_pack
    packs = plan_packs(members, largest=largest) if part is None else plan_part(members, part, largest=largest)
    names = {m.name for p in packs for m in p.members}
    numbers = None if part is None else [i for i, m in enumerate(members) if m.name in names]
    prepare = Preparer()

    def open_run() -> RunDirectory:
        where, name, text = config.tracking.dir, config.name, dump_config(config)
        return writer_first(lambda: RunDirectory.open(where, name, text, fresh=fresh, write=is_writer(), members=numbers))

    # An old run is resumed or refused before anything is loaded. A new directory is made only when every member is known to be
    # right: wrong input leaves nothing behind that would stand in the way of the mended config.
    run = open_run() if not fresh and writer_says(holds_run(Path(config.tracking.dir) / config.name)) else None
    try:
        if run is not None and part is None:
            held = run
            writer_first(lambda: take_over_names(held, config, members) if is_writer() else held.refresh())
            packs = plan_remaining(members, run, largest=largest)
        ended = {n: s for n, s in run.statuses.items() if n in names} if run is not None else {}
        packs = [p for p in packs if any(m.name not in ended for m in p.members)]
        for pack_plan in reversed(packs):  # the first last, so that its setup is at hand for training
            configs = [m.config for m in pack_plan.members]
            check_adapters(prepare(configs[0]), configs)
        run = run or open_run()
        if run.resumed:
            progress.print(f"{run.path}: resumed, {len(ended)} of {len(names)} members are done.")
        compiled = 0
        told: Setup | None = None
        for number, pack_plan in enumerate(packs, 1):
            setup = prepare(pack_plan.members[0].config)
            if setup is not told:
                progress.print(describe_setup(pack_plan.members[0].config, setup))
                told = setup
            compiled += _run_pack(run, pack_plan, setup, signals, progress, f"pack {number}/{len(packs)}")
        done = {r.name: r for r in writer_first(run.results)} if names else {}
        results = [done[m.name] for m in members if m.name in done]
        if is_writer() and len(results) == len(members):
            run.write_results(results)
            if packs and part is None:  # a call that found all members done, or trained some of them, has no figures of the whole
                run.write_summary({"compiled_programs": compiled, "packs": len(packs), "seconds": time.perf_counter() - began})
        outcome = SweepOutcome(run.path, results, compiled, len(members) - len(results))
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
            save = member.config.tracking.save
            for kind, arrays in (("final", outcome.final_arrays), ("best", outcome.best_arrays)):
                if save in (kind, "both"):
                    own = pack.member_arrays(self.setup.model, i, arrays)  # in every process: all may hold a part of them
                    if is_writer():
                        save_adapter(folder / kind, own)
            self.writers[i].close(status)
            result = MemberResult(
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
            )
            if is_writer():
                result.write(folder)
        self.ended = True
