import io

from lora_jax.tracking import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_now_and_then_when_not_a_terminal(capsys):
    stream, now = io.StringIO(), [0.0]
    with Progress(stream, interval=10, clock=lambda: now[0]).track(100, "training 8 members", start=20) as track:
        for step in range(21, 101):
            now[0] += 1
            track.update(step, loss=1.23456)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[0] == "training 8 members: 30/100 (30 %), loss 1.235, 1:10 left"
    assert lines[-1] == "training 8 members: 100/100 (100 %), loss 1.235, in 1:20"
    assert capsys.readouterr() == ("", "")


def test_it_goes_to_stderr_and_nowhere_when_disabled(capsys):
    for enabled in (True, False):
        with Progress(enabled=enabled).track(1, "[work]") as track:
            track.update(1)
        out, err = capsys.readouterr()
        assert out == "" and ("[work]: 1/1" in err) == enabled


def test_two_bars_at_once_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    progress = Progress(stream)
    with progress.track(10, "sweep") as outer:
        outer.update(5, loss=0.5)
        with progress.track(4, "evaluating") as inner:
            inner.update(4)
        outer.update(10)
        progress.print("[note]")
    with progress.track(2, "again") as track:
        track.update(2)
    text = stream.getvalue()
    assert all(word in text for word in ("sweep", "evaluating", "loss 0.5", "10/10", "again", "[note]"))


def test_descriptions_with_brackets_at_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    progress = Progress(stream)
    with progress.track(1, "rank=[INST] [/INST] :smile:") as track:
        progress.print("[/b] :smile:")
        track.update(1)
    assert "rank=[INST] [/INST] :smile:" in stream.getvalue() and "[/b] :smile:" in stream.getvalue()
