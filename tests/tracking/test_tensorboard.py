import time

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from lora_jax.tracking import MemberWriter


def write(folder, rank, status="finished", **how):
    hparams = {"adapter.rank": rank, "adapter.targets": ["q_proj", "v_proj"], "adapter.rslora": False, "adapter.layers": None}
    with MemberWriter(folder, hparams, metrics=["eval/accuracy", "eval/loss"], **how) as writer:
        for step in (0, 10, 20):
            writer.scalars(step, {"train/loss": 1.0 / (step + rank), "eval/accuracy": step / 100 + rank / 1000, "eval/loss": 2.0})
        writer.close(status)


def events(folder):
    return EventAccumulator(str(folder)).Reload()


def test_scalars_come_back(tmp_path):
    write(tmp_path, 4)
    back = events(tmp_path)
    assert set(back.Tags()["scalars"]) == {"train/loss", "eval/accuracy", "eval/loss"}
    assert [(e.step, pytest.approx(e.value)) for e in back.Scalars("train/loss")] == [(0, 0.25), (10, 1 / 14), (20, 1 / 24)]


def test_tensorboard_compares_members_without_sub_runs(tmp_path):
    for rank in (4, 16):
        write(tmp_path / f"rank={rank}", rank, "finished" if rank == 4 else "diverged", domains={"adapter.rank": [4, 16]})
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    assert set(multiplexer.Runs()) == {"rank=4", "rank=16"}
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE],
        col_params=[api_pb2.ColParams(hparam="adapter.rank", order=api_pb2.ORDER_ASC)],
    )
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert [g.name for g in groups] == ["rank=4", "rank=16"]
    assert [g.hparams["adapter.rank"].number_value for g in groups] == [4, 16]
    assert groups[0].hparams["adapter.targets"].string_value == "q_proj,v_proj"
    assert [{m.name.tag: pytest.approx(m.value) for m in g.metric_values} for g in groups] == [
        {"eval/accuracy": 0.204, "eval/loss": 2.0},
        {"eval/accuracy": 0.216, "eval/loss": 2.0},
    ]
    assert [g.sessions[0].status for g in groups] == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    asked = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(RequestContext(), context, "", asked).run()
    assert [m.name.tag for m in experiment.metric_infos] == ["eval/accuracy", "eval/loss"]
    kinds = {h.name: h.type for h in experiment.hparam_infos}
    assert kinds["adapter.rank"] == api_pb2.DATA_TYPE_FLOAT64 and kinds["adapter.rslora"] == api_pb2.DATA_TYPE_BOOL


def test_resuming_hides_the_steps_that_were_lost(tmp_path):
    killed = MemberWriter(tmp_path, {"adapter.rank": 4})
    for step in (0, 10, 20, 30):
        killed.scalars(step, {"train/loss": 1.0})
    killed.flush()  # no close: the process died; the last checkpoint was at step 10
    with MemberWriter(tmp_path, {"adapter.rank": 4}, resume_step=10) as writer:
        writer.scalars(20, {"train/loss": 2.0})
    assert len(list(tmp_path.glob("*tfevents*"))) == 2
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(0, 1.0), (10, 1.0), (20, 2.0)]


def test_a_clock_set_back_leaves_the_curves_in_order(tmp_path, monkeypatch):
    """The files of a run that goes on are read after those before it, whatever second they were begun in."""
    now = 1_700_000_000.0
    for number, clock in enumerate((now, now - 10_000.0, now - 20_000.0)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        with MemberWriter(tmp_path, {"adapter.rank": 4}, resume_step=10 * number if number else None) as writer:
            writer.scalars(10 * (number + 1), {"train/loss": float(number)})
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")] == [(10, 0.0), (20, 1.0), (30, 2.0)]


def test_an_error_ends_the_session_and_a_closed_writer_complains(tmp_path):
    with pytest.raises(RuntimeError), MemberWriter(tmp_path, {}) as writer:
        raise RuntimeError
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.scalars(1, {"train/loss": 1.0})


def test_texts_and_images_come_back(tmp_path):
    import numpy as np

    from lora_jax.tracking.panels import confusion_png, samples_table

    table = samples_table(["2 | 2"] * 9, [["4", "four"]] * 9, ["five\n<b>"] * 9)
    assert len(table.splitlines()) == 8 and "| 2 \\| 2 | 4 / four | five<br>&lt;b> |" in table
    png = confusion_png(np.array([[3, 1], [0, 2]]), ["good", "a $class$ with a name that is much too long"])
    with MemberWriter(tmp_path, {}) as writer:
        writer.text(5, "eval/samples", table)
        writer.image(6, "eval/confusion", png)
    back = events(tmp_path)
    (text,) = back.Tensors("eval/samples/text_summary")
    assert text.step == 5 and text.tensor_proto.string_val[0].decode() == table
    (image,) = back.Images("eval/confusion")
    assert image.step == 6 and image.encoded_image_string == png and png.startswith(b"\x89PNG") and image.width > 150 < image.height
    # With many classes their names are left out, and the image stays of a size that can be looked at.
    assert len(confusion_png(np.eye(120, dtype=int), [str(i) for i in range(120)])) < 100_000
