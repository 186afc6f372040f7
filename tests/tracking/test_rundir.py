import json
import subprocess
import sys

import pytest

from lora_jax.config.load import dump_config
from lora_jax.errors import InputError
from lora_jax.tracking import MemberResult, RunDirectory, member_folder, write_atomic, write_json
from lora_jax.tracking import files as locks
from tests import tiny


class Device:
    platform, device_kind = "cpu", "cpu"


CONFIG = "name: a\nadapter: {rank: 8, alpha: 16.0}\ntracking: {dir: runs}\n"


def start(root, config=CONFIG, **how):
    return RunDirectory.open(root, "a", config, devices=[Device()], **how)


@pytest.fixture(autouse=True)
def unlocked():
    yield
    for path in list(locks._held):
        locks.release(path.parent)


def test_a_new_run_says_what_it_is_and_ran_on(tmp_path):
    run = start(tmp_path)
    assert (run.path / "config.yaml").read_text() == CONFIG
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["devices"] == {"kind": "cpu", "count": 1} and environment["packages"]["jax"]
    assert not run.resumed and run.statuses == {} and run.replaced is None


def test_the_same_config_resumes_and_knows_who_is_finished(tmp_path):
    run = start(tmp_path)
    for name, status in (("rank=4", "finished"), ("rank=8", "diverged")):
        MemberResult(name, {}, 1, status, {}).write(run.member(name))
    # Moving the folder, or writing the same config in another way, is no other experiment.
    again = start(tmp_path, "name: a\nadapter:\n  alpha: 16.0\n  rank: 8\ntracking: {dir: elsewhere}\n")
    assert again.resumed and again.statuses == {"rank=4": "finished", "rank=8": "diverged"}
    assert len(json.loads((run.path / "environment.json").read_text())["resumed"]) == 1
    other = start(tmp_path, write=False)
    assert other.resumed and other.statuses["rank=4"] == "finished"


def test_another_config_is_refused_and_nothing_changes(tmp_path):
    run = start(tmp_path)
    with pytest.raises(InputError) as error:
        start(tmp_path, CONFIG.replace("rank: 8", "rank: 4").replace("alpha: 16.0", "alpha: 8.0"))
    text = str(error.value)
    assert "adapter.rank: 8 -> 4" in text and "adapter.alpha: 16.0 -> 8.0" in text and "--fresh" in text and "name=" in text
    assert (run.path / "config.yaml").read_text() == CONFIG


WHOLE = dump_config(tiny.config())


@pytest.mark.parametrize(
    ("old", "told"),
    [
        (WHOLE.replace("  clip_norm: null\n", "").replace("  b_lr_ratio: 1.0\n", ""), None),
        (WHOLE[: WHOLE.index("optimizer:")] + WHOLE[WHOLE.index("training:") :], "optimizer"),
        (WHOLE.replace("kind: classification\n", "kind: classification\n  stride: 16\n").replace("  eps: 1.0e-08\n", ""), None),
        (WHOLE.replace("kind: classification\n", "kind: classification\n  strid: 16\n"), "task.strid: 16 -> (absent)"),
        (WHOLE.replace("  clip_norm: null\n", "  clip_norm: 1.0\n  gone: 1\n"), "optimizer.clip_norm: 1.0 -> null"),
    ],
    ids=["absent defaults", "absent section", "another kind's key", "no kind's key", "another value"],
)
def test_what_says_nothing_is_no_difference(tmp_path, old, told):
    """A key that lacks has its default, and one of another method or task never did anything."""
    start(tmp_path, old)
    if told is None:
        assert start(tmp_path, WHOLE).resumed
    else:
        with pytest.raises(InputError) as refused:
            start(tmp_path, WHOLE)
        assert told in str(refused.value)


def test_at_most_eight_differences_are_listed(tmp_path):
    start(tmp_path)
    with pytest.raises(InputError) as error:
        start(tmp_path, CONFIG + "".join(f"k{i}: {i}\n" for i in range(11)))
    assert str(error.value).count(" -> ") - 1 == 8 and "3 more" in str(error.value)


def test_fresh_keeps_the_old_run_aside(tmp_path):
    run = start(tmp_path)
    MemberResult("m", {}, 1, "finished", {}).write(run.member("m"))
    new = start(tmp_path, CONFIG.replace("8", "4"), fresh=True)
    assert new.replaced == tmp_path / "a.old-1" and (new.replaced / "m" / "results.json").exists()
    assert not (new.path / "m").exists() and not new.resumed
    assert start(tmp_path, fresh=True).replaced == tmp_path / "a.old-2"


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_run_directory_is_left_alone(tmp_path, fresh):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a run directory"):
        start(tmp_path, fresh=fresh)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["..", "", "a/b", "/x", "a\\b", ".hidden"])
def test_a_run_name_cannot_leave_the_root(tmp_path, name):
    with pytest.raises(InputError):
        RunDirectory.open(tmp_path, name, CONFIG, devices=[])


def test_a_second_process_is_turned_away(tmp_path):
    start(tmp_path).close()
    code = "import fcntl,sys; f=open(sys.argv[1],'ab'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a/.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process"):
            start(tmp_path)
    finally:
        other.communicate(b"\n")
    assert start(tmp_path).resumed


def test_member_folders_are_safe_unique_and_stable(tmp_path):
    assert member_folder("rank=4,targets=attention") == "rank=4,targets=attention"
    names = ["../x", "..", ".", "a/b", "a_b", "a b", "", "x" * 300, "x" * 301, "config.yaml", "tab\t", "targets=['q', 'v']"]
    folders = [member_folder(n) for n in names]
    assert len(set(folders)) == len(names) and folders == [member_folder(n) for n in names]
    for folder in folders:
        assert (tmp_path / folder).resolve().parent == tmp_path.resolve() and len(folder) < 120 and not folder.startswith(".")
    assert member_folder("config.yaml") != "config.yaml"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = write_atomic(tmp_path / "f.json", "old")
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.json"]
