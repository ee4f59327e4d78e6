"""The report: self-contained, complete, and true to what it is given."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import re
from xml.etree import ElementTree

import av
import pytest

from avcl_jax.data.views import Timeline
from avcl_jax.evaluation.evaluate import evaluate
from avcl_jax.evaluation.exhibits import clip_uri
from avcl_jax.evaluation.run_report import lead, probe_section, retrieval_section, temporal_section
from avcl_jax.page import as_text, times_chance
from tests.evaluation.conftest import small_evaluation, small_record

PROBE = {"random": 0.36, "pretrained": 0.71, "supervised": 0.9, "gap_closed": 0.65, "chance": 0.2}


class _References(html.parser.HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    def __init__(self):
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "data-clip", "xlink:href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loaded += [v for k, v in attributes if k in ("src", "href", "data-clip", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def html(small_run) -> str:
    config = small_evaluation()
    config.evaluation.supervised.enabled = False
    config.evaluation.null.train_split = ""
    evaluate(config, small_run[1])
    return (small_run[1] / "report.html").read_text()


def test_nothing_is_loaded_from_outside(html):
    references = _References()
    references.feed(html)
    assert references.open == []
    assert len(references.loaded) > 30
    assert all(reference.startswith(("data:", "#")) for reference in references.loaded)
    assert "url(http" not in html


def test_queries_and_their_results_have_stills_spectrograms_and_clips(html):
    # Two directions and two probes, each with a query and two results, of two stills.
    assert html.count("data:image/jpeg;base64,") == 2 * 4 * 3
    assert html.count("data:image/png;base64,") == 4 * 3
    assert html.count("data:video/mp4;base64,") == 4 * 3
    assert html.count('class="video query"') == 4
    # A median rank is not a multiple of chance, and neither is the closed gap.
    tiles = re.findall(r'class="tile"><b>[^<]*</b><span>(.*?), [\d.]+\xa0×\xa0chance<', html)
    assert sum(bool(re.fullmatch(r"R@\d, \w+ → \w+", tile)) for tile in tiles) == 4
    for part in (
        "What was learned from demo",
        *("Linear probes", "Temporal tasks", "Finding the other half", "Nearest neighbours"),
        *("Playback speed (1×, 2×, 4×),", "<h2>Training</h2>", "video–audio"),
    ):
        assert part in html


def test_charts_are_well_formed_and_their_text_takes_the_colour_of_the_page(html):
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) >= 4
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "#000000" not in chart
        assert re.search(r"<text style=\"(?!.*fill)", chart)
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]+)', html)
    assert set(references) <= set(ids)


def test_a_leaking_null_control_is_called_out_and_a_skipped_one_named():
    score = {"accuracy": 0.8, "chance": 0.5}
    view = {
        "temporal": {
            "direction_video": score | {"null_accuracy": 0.505},
            "direction_audio": score | {"null_accuracy": 0.57},
        },
        "null_control": {},
    }
    shown = temporal_section(view, (1, 2))
    assert shown.count("The rendering leaks the label") == 1
    assert "direction, audio: on noise" in shown
    assert "57.0 %" in shown
    skipped = view | {"null_control": {"skipped": "there is <no> noise"}}
    assert "there is &lt;no&gt; noise" in temporal_section(skipped, (1, 2))


def test_sections_without_results_are_left_out():
    assert probe_section({"probe": {}}, {}, {}) == ""
    assert retrieval_section({}, "") == ""
    assert temporal_section({"temporal": {}}, (1, 2)) == ""


def test_the_lead_names_the_encoders_of_the_run() -> None:
    whom = {"audio_visual": "Two encoders", "video": "A video encoder", "audio": "An audio encoder"}
    for modalities, who in whom.items():
        first = lead({"probe": {"motion_from_video": PROBE}}, modalities)
        assert first.startswith(f"{who} learned from unlabelled videos.")
        assert "<b>motion</b> from the pretrained video encoder on 71 % of" in first


def test_the_retrieval_table_has_every_recall_that_was_asked_for() -> None:
    scores = {"chance": 0.01, "median_rank": 9.0, "queries": 99, "gallery": 99}
    for k in (100, 1, 3):
        scores |= {f"r{k}": 0.5, f"chance_r{k}": 0.25}
    shown = retrieval_section({"audio_to_video": scores}, "")
    assert re.findall(r"R@(\d+) \(× chance\)", shown) == ["1", "3", "100"]
    assert shown.count("50.0 % (2.0\u00a0×)") == 3
    assert "9 of 99" in shown


@pytest.mark.parametrize("rate", [4000, 16_000])
def test_clips_play_for_as_long_as_they_should(rate):
    record = dataclasses.replace(small_record("train", 0), sample_rate_hz=rate)
    if rate == 16_000:
        record = dataclasses.replace(record, waveform=record.waveform.repeat(4))
    whole = Timeline(0.0, 3.0, 1 / 16)
    found = {}
    for name, use in (("both", whole), ("audio", dataclasses.replace(whole, has_video=False))):
        uri = clip_uri(record, use, 0.5, 2.0)
        data = io.BytesIO(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
        with av.open(data) as container:
            found[name] = {s.type: float(s.duration * s.time_base) for s in container.streams}
            assert all((s.width, s.height) == (16, 16) for s in container.streams.video)
    assert found["both"]["video"] == pytest.approx(2.0, abs=0.07)
    assert found["both"]["audio"] == pytest.approx(2.0, abs=0.1)
    assert list(found["audio"]) == ["audio"]


def test_values_are_written_in_their_unit_and_differences_with_their_sign():
    # Only all of them is 100 %.
    texts = [as_text(v, digits=0) for v in (0.0, 0.005, 0.994, 0.995, 0.9996, 1.0)]
    assert texts == ["0 %", "0 %", "99 %", "99.5 %", "99.96 %", "100 %"]
    assert as_text(None) == as_text(float("nan"), signed=True) == "–"
    assert as_text(12.3456, "number") == "12.3"
    assert [as_text(v, signed=True) for v in (0.0123, -0.0001, -0.05)] == ["+1.2", "+0.0", "-5.0"]
    assert as_text(2.5, "number", signed=True) == "+2.5"
    assert times_chance(0.3, 0.1) == "3.0\u00a0×"
    assert times_chance(0.3, 0.0) == times_chance(None, 0.5) == times_chance(0.3, None) == ""
