"""TensorBoard events of one member: its scalars, texts and images, and its row in the HParams tab, in one event file.

`tensorboard --logdir runs/NAME` then shows one curve and one HParams row a member, under the member's folder name.
tensorboardX's own `add_hparams` is not used: it writes the row into a sub-run of its own, apart from the curves.
"""

# protobuf makes the names of its modules when they are imported:
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter  # the synchronous writer: no threads, nothing lost when killed
from tensorboardX.proto import api_pb2, event_pb2, plugin_hparams_pb2, plugin_text_pb2
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.proto.tensor_pb2 import TensorProto
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

FLUSH_SECONDS = 5.0  # each flush is an fsync, and a pack has one writer a member
_VERSION = "brain.Event:2"
_STATUS = {
    "finished": "STATUS_SUCCESS",
    "diverged": "STATUS_FAILURE",
    "failed": "STATUS_FAILURE",
    "interrupted": "STATUS_UNKNOWN",
    "stopped": "STATUS_UNKNOWN",
}


class MemberWriter:
    """Writes one member's scalars, texts, images and HParams entries.

    Args:
        folder: The member's folder; its name is the run's name in TensorBoard.
        hparams: What tells this member from the others: dotted config key -> value. Lists are shown comma-joined.
        metrics: Scalar tags shown as columns of the HParams tab (the last value of each counts).
        domains: Optional swept key -> all its values, which gives the HParams tab its filters.
        resume_step: The step training goes on after. What an interrupted run wrote beyond it is hidden by TensorBoard.
    """

    def __init__(
        self,
        folder: Path | str,
        hparams: Mapping[str, Any],
        *,
        metrics: Sequence[str] = ("eval/loss",),
        domains: Mapping[str, Sequence[Any]] | None = None,
        resume_step: int | None = None,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Event files are read in the order of their names, which hold the second: a count before it keeps the order of the run, whatever
        # the clock says. Older versions wrote `events.out...`, which comes before any `events.resumed-0001...`.
        count = len(list(folder.glob("*tfevents*")))
        self._writer: EventsWriter | None = EventsWriter(str(folder / (f"events.resumed-{count:04d}" if count else "events")), "")
        self._flushed = time.monotonic()
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(resume_step + 1, session_log=start)
        shown = {key: _plain(value) for key, value in hparams.items()}
        self._hparams("experiment", experiment=_experiment(shown, metrics, domains or {}))
        # Sessions with one group name are averaged into one row, so each member is a group of its own.
        start_info = plugin_hparams_pb2.SessionStartInfo(group_name=folder.name, start_time_secs=time.time())
        for key, value in shown.items():
            _set(start_info.hparams[key], value)
        self._hparams("session_start_info", session_start_info=start_info)
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records `tag -> value` at `step`: `train/loss`, `train/learning_rate`, `eval/accuracy`, ... (numbers on the host)."""
        items = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._event(step, summary=Summary(value=items))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Records a text, shown in the Text tab; Markdown."""
        content = plugin_text_pb2.TextPluginData(version=0).SerializeToString()
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text", content=content))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape)
        self._event(step, summary=Summary(value=[Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)]))

    def image(self, step: int, tag: str, png: bytes) -> None:
        """Records an image, shown in the Images tab."""
        width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))  # of the first chunk
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._event(step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def flush(self) -> None:
        """Brings everything recorded so far to the disk."""
        self._flushed = time.monotonic()
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str = "finished") -> None:
        """Ends the session as `finished`, `diverged`, `failed` or `interrupted`. Closing again does nothing."""
        if self._writer is None:
            return
        code = api_pb2.Status.Value(_STATUS[status])
        self._hparams("session_end_info", session_end_info=plugin_hparams_pb2.SessionEndInfo(status=code, end_time_secs=time.time()))
        self._writer.close()
        self._writer = None

    def __enter__(self) -> MemberWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close("finished" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted")

    def _event(self, step: int, **content: Any) -> None:
        if self._writer is None:
            raise ValueError("this writer is closed")
        if "session_log" in content:  # TensorBoard heeds it only right behind a version record
            self._writer.write_event(event_pb2.Event(step=step, wall_time=time.time(), file_version=_VERSION))
        self._writer.write_event(event_pb2.Event(step=step, wall_time=time.time(), **content))

    def _hparams(self, tag: str, **content: Any) -> None:
        data = plugin_hparams_pb2.HParamsPluginData(version=0, **content).SerializeToString()
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="hparams", content=data))
        empty = TensorProto(dtype="DT_FLOAT", tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
        self._event(0, summary=Summary(value=[Summary.Value(tag=f"_hparams_/{tag}", metadata=metadata, tensor=empty)]))


class NullWriter:
    """Stands in for `MemberWriter` where `tracking.tensorboard` is off, or in processes other than the first."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def image(self, step: int, tag: str, png: bytes) -> None: ...

    def flush(self) -> None: ...

    def close(self, status: str = "finished") -> None: ...

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, *error: object) -> None: ...


def _plain(value: Any) -> str | float | bool:
    """The plugin knows strings, numbers and booleans only."""
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (list, tuple)):
        return ",".join(str(_plain(item)) if isinstance(item, str) else json.dumps(item) for item in value)
    return "none" if value is None else json.dumps(value)


def _set(target: Any, value: str | float | bool) -> None:
    """Puts `value` into a protobuf `Value`."""
    kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
    setattr(target, kind, value)


def _experiment(hparams: Mapping[str, Any], metrics: Sequence[str], domains: Mapping[str, Sequence[Any]]) -> api_pb2.Experiment:
    experiment = api_pb2.Experiment(time_created_secs=time.time())
    for key, value in hparams.items():
        values = [_plain(v) for v in domains.get(key, ())]
        numbers = [v for v in [value, *values] if isinstance(v, float)]
        if isinstance(value, bool):
            info = experiment.hparam_infos.add(name=key, type=api_pb2.DATA_TYPE_BOOL)
        elif len(numbers) == len(values) + 1:
            info = experiment.hparam_infos.add(name=key, type=api_pb2.DATA_TYPE_FLOAT64)
        else:
            info = experiment.hparam_infos.add(name=key, type=api_pb2.DATA_TYPE_STRING)
        for item in dict.fromkeys(values):
            _set(info.domain_discrete.values.add(), item)
    for tag in metrics:
        kind = "DATASET_VALIDATION" if tag.startswith("eval/") else "DATASET_TRAINING"
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag), dataset_type=kind)
    return experiment
