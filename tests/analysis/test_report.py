import math
import re
from html.parser import HTMLParser

import pytest

from lora_jax.analysis import report, report_run
from lora_jax.errors import InputError
from lora_jax.tracking import MemberResult, write_json

EVIL = "<script>alert('x')</script>"


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    run = tmp_path / "reviews"
    for rank, accuracy in ((4, 0.8), (8, 0.9), (16, math.nan)):
        settings = {"adapter.rank": rank, "adapter.targets": EVIL}
        status = "diverged" if math.isnan(accuracy) else "finished"
        MemberResult(EVIL, settings, 1000 * rank, status, {"accuracy": accuracy}, padding_share=0.25).write(run / str(rank))
    (run / "config.yaml").write_text(f'name: reviews\nmodel:\n  source: org/base\ntraining:\n  steps: 40\ntask:\n  kind: "{EVIL}"\n')
    write_json(run / "environment.json", {"python": "3.11", "devices": {"kind": EVIL, "count": 4}})
    write_json(
        run / "state.json", {"summary": {"compiled_programs": 3, "seconds": 61.0, "data": [f"held-out: 20 of 120 rows of {EVIL}, sampled"]}}
    )
    return report_run(run).read_text()


def test_the_page_says_what_happened(page):
    text = re.sub(r"<[^>]*>", " ", page)
    settings, figures = (
        ("reviews", "base", "40 steps", "3.11"),
        ("90.0", "8,000", "compiled programs", "1:01", "25.0 %", "held-out: 20 of 120 rows"),
    )
    for words in (*settings, *figures, "diverged", "single learning rate"):
        assert words in text, words
    assert re.search(r'<tr class="best">.*?8,000.*?90\.0', page) and "nan" not in text


def test_the_page_gives_intervals_and_differences_to_the_reference(tmp_path):
    values = {(1, 1e-3): (0.7, 0.8), (1, 1e-2): (0.6, 0.6), (8, 1e-3): (0.6, 0.7), (8, 1e-2): (0.8, 0.9)}
    for (rank, rate), pair in values.items():
        for seed, value in enumerate(pair):
            settings = {"adapter.rank": rank, "optimizer.learning_rate": rate, "training.seed": seed}
            name = f"{rank}-{rate}-{seed}"
            MemberResult(name, settings, 1000 * rank, "finished", {"accuracy": value}).write(tmp_path / name)
    (tmp_path / "config.yaml").write_text("name: r\nsweep: {reference: {adapter.rank: 1}}\n")
    text = " ".join(re.sub(r"<[^>]*>", " ", report_run(tmp_path).read_text()).split())
    tuned, _, every = text.partition("Each at its best learning rate")[2].partition("Members")
    assert (
        "to rank=1" in tuned
        and re.search(r"8 0\.01 2 8,000 85\.0 ± 63\.5 85\.0 ± 63\.5 \+10\.0 ± 0\.0", tuned)
        and "1e-3 2 8,000" not in tuned
    )
    assert re.search(r"8 1e-3 2 8,000 65\.0 ± 63\.5 65\.0 ± 63\.5 -10\.0 ± 0\.0", every)


def test_the_page_says_how_far_training_and_held_out_rows_part(tmp_path):
    for seed, (train, held_out) in enumerate(((0.98, 0.7), (1.0, 0.8))):
        settings = {"adapter.rank": 4, "training.seed": seed}
        result = MemberResult(str(seed), settings, 4000, "finished", {"accuracy": held_out}, train={"accuracy": train, "loss": 0.1})
        result.write(tmp_path / str(seed))
        assert MemberResult.read(tmp_path / str(seed)) == result
    (tmp_path / "config.yaml").write_text("name: r\n")
    text = " ".join(re.sub(r"<[^>]*>", " ", report_run(tmp_path).read_text()).split())
    assert "training accuracy (%) final accuracy (%)" in text and re.search(r"4,000 99\.0 ± 12\.7 75\.0 ± 63\.5", text)


def test_the_page_is_whole_escaped_and_loads_nothing(page):
    found = Tags(page)
    assert found.open == []
    assert not {"script", "link", "iframe"} & {tag for tag, _ in found.tags} and EVIL not in page
    sources = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert "http://" not in page and "https://" not in page


def test_a_damaged_run_is_refused(tmp_path):
    with pytest.raises(InputError):
        report_run(tmp_path)


def test_the_page_tells_stopped_from_diverged(tmp_path):
    for rank, status in ((2, "stopped"), (4, "finished"), (8, "stopped"), (16, "diverged")):
        result = MemberResult(
            str(rank), {"adapter.rank": rank}, rank, status, {"accuracy": 0.5}, steps=8, rung=1 if status == "stopped" else None
        )
        result.write(tmp_path / str(rank))
    (tmp_path / "config.yaml").write_text("name: r\ntraining: {steps: 40, extend_steps: 8}\n")
    page = report_run(tmp_path).read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    assert "48 steps" in text
    assert "2 stopped by halving" in text and "1 diverged" in text and "diverged or failed" not in text
    assert text.count("stopped (rung 1)") == 2 and page.count('class="bad"') == 1


@pytest.mark.parametrize(
    ("training", "told"),
    [("{steps: 40}", "40 steps"), ("{steps: 40, extend_steps: 8}", "48 steps"), ("{epochs: 2, extend_steps: 8}", "2 epochs and 8 steps")],
)
def test_the_steps_of_an_extended_run_are_all_of_them(training, told):
    assert report._about(f"name: a\ntraining: {training}\n") == told
