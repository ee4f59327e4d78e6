"""The report: self-contained, complete, and true to what it is given."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import re
from xml.etree import ElementTree

import av
import numpy as np
import pytest

from avcl_jax.evaluation.charts import line_chart
from avcl_jax.evaluation.exhibits import Exhibit, Search, clip_uri
from avcl_jax.evaluation.page import as_text, page
from avcl_jax.evaluation.run_report import RunContent, lead, run_sections
from avcl_jax.evaluation.training_curves import Curves

CLASSES = ("bounce", "swing", "slide", "roll", "orbit")


def _exhibit(rng: np.random.Generator, number: int, clip: str) -> Exhibit:
    rows, columns = np.mgrid[:48, :48]
    stills = np.zeros((3, 48, 48, 3), np.uint8)
    hue = rng.integers(80, 256, size=3)
    for index, still in enumerate(stills):
        x, y = 10 + 14 * index, 24 + 14 * np.sin(index + number)
        still[:] = 40 + rows[..., None] // 2
        still[(rows - y) ** 2 + (columns - x) ** 2 < 40] = hue
    spectrogram = rng.normal(size=(48, 40)) * 0.4 - 1.0
    spectrogram[:: 7 + number % 5] += np.linspace(3.0, 0.5, 40)
    labels = f"glass, {CLASSES[number % 5]}"
    return Exhibit(f"test/{number:04d}", labels, stills, spectrogram, clip)


def _score(rng: np.random.Generator, classes: int, accuracy: float) -> dict:
    confusion = np.full((classes, classes), round(300 * (1 - accuracy) / (classes - 1)))
    np.fill_diagonal(confusion, round(300 * accuracy))
    return {
        "accuracy": accuracy,
        "chance": 1 / classes,
        "confusion": (confusion + rng.integers(0, 9, confusion.shape)).tolist(),
    }


def render(content: RunContent) -> str:
    return page(title="A run", body="".join(run_sections(content)))


def synthetic_content() -> RunContent:
    """Returns a report of invented numbers, for looking at the page."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, size=(6, 48, 48, 3), dtype=np.uint8)
    clip = clip_uri(
        frames,
        fps=16.0,
        waveform=(3000 * rng.normal(size=6000)).astype(np.int16),
        sample_rate_hz=16_000,
    )
    exhibits = [_exhibit(rng, n, clip) for n in range(12)]
    temporal = {
        "speed_video": _score(rng, 4, 0.73) | {"null_accuracy": 0.262},
        "speed_audio": _score(rng, 4, 0.89) | {"null_accuracy": 0.249},
        "direction_video": _score(rng, 2, 0.81) | {"null_accuracy": 0.505},
        "direction_audio": _score(rng, 2, 0.97) | {"null_accuracy": 0.57},
        "order_vv": _score(rng, 3, 0.75),
        "order_aa": _score(rng, 3, 0.86),
        "order_va": _score(rng, 3, 0.66),
    }
    scores = {"chance": 0.005, "median_rank": 31.0, "queries": 200, "gallery": 200}
    for k, value in {1: 0.045, 5: 0.17, 10: 0.26, 20: 0.41, 50: 0.66}.items():
        scores |= {f"r{k}": value, f"chance_r{k}": k / 200}
    probe = {"random": 0.36, "pretrained": 0.71, "supervised": 0.9, "gap_closed": 0.65}
    statistics = ("mean_colour", "position_histogram", "mean_loudness", "mean_log_mel")
    trivial = dict(zip(statistics, (0.22, 0.4, 0.21, 0.31), strict=True))
    steps = np.arange(0, 3000, 20)
    decay = np.exp(-steps / 900)

    def noisy(low: float, high: float) -> np.ndarray:
        return low + (high - low) * decay + 0.05 * rng.normal(size=len(steps))

    searches = [
        Search(
            query=exhibits[n],
            query_modality="audio",
            found=[exhibits[(n + 3 + k) % 12] for k in range(4)] + [exhibits[n]],
            found_modality="video",
            hits=[False, False, False, False, True],
            remark=f"query {n}: the right picture is number 5 of 200",
        )
        for n in range(2)
    ]
    reverse = [
        dataclasses.replace(s, query_modality="video", found_modality="audio") for s in searches
    ]
    return RunContent(
        view={
            "probe": {
                "motion_from_video": probe | {"chance": 0.2},
                "material_from_audio": probe | {"chance": 0.2, "pretrained": 0.82},
            },
            "trivial": {"motion_from_video": trivial, "material_from_audio": trivial},
            "retrieval": {"audio_to_video": scores, "video_to_audio": scores},
            "temporal": temporal,
        },
        curves=[
            Curves(
                "Contrastive loss",
                "loss",
                {"video–video": (steps, noisy(2.1, 4.2)), "video–audio": (steps, noisy(2.6, 4.2))},
                False,
                False,
            ),
            Curves(
                "Temporal tasks, training views",
                "accuracy",
                {name: (steps, noisy(0.4 + 0.08 * i, 0.3)) for i, name in enumerate(temporal)},
                True,
                True,
            ),
        ],
        bank_start=1000,
        searches={"audio_to_video": searches, "video_to_audio": reverse},
        bank={},
        neighbours={"By the picture": reverse[:1], "By the sound": searches[:1]},
        maps=[
            (title, *_islands(rng), CLASSES)
            for title in ("Picture, coloured by motion", "Sound, coloured by material")
        ],
        planes=[
            [
                (f"Picture, coloured by motion: {network}", *_islands(rng), CLASSES)
                for network in ("random encoder", "pretrained encoder")
            ]
        ],
        probe_confusions={"motion_from_video": (np.eye(5, dtype=int) * 30 + 2, CLASSES)},
        task_classes={
            "speed_video": ("1×", "2×", "4×", "8×"),
            "speed_audio": ("1×", "2×", "4×", "8×"),
            "direction_video": ("forward", "backward"),
            "direction_audio": ("forward", "backward"),
            "order_vv": ("before", "overlap", "after"),
            "order_aa": ("before", "overlap", "after"),
            "order_va": ("before", "overlap", "after"),
        },
    )


def _islands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(200) % 5
    return rng.normal(size=(200, 2)) + 3.0 * rng.normal(size=(5, 2))[labels], labels


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
def html() -> str:
    return render(synthetic_content())


def test_nothing_is_loaded_from_outside(html):
    references = _References()
    references.feed(html)
    assert references.open == []
    assert len(references.loaded) > 50
    assert all(reference.startswith(("data:", "#")) for reference in references.loaded)
    assert "url(http" not in html


def test_stills_spectrograms_and_clips_are_in_the_page(html):
    assert html.count("data:image/jpeg;base64,") == 6 * 6 * 3
    assert html.count("data:image/png;base64,") == 6 * 6
    assert html.count("data:video/mp4;base64,") == 6 * 6
    assert html.count('class="video hit"') == 6


def test_charts_are_well_formed_and_take_the_inks_of_the_page(html):
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "var(--ink)" in chart or "var(--muted)" in chart
    ids = re.findall(r'id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_leaking_null_control_is_called_out(html):
    assert html.count("The rendering leaks the label") == 1
    assert "direction, audio: on noise" in html
    assert "57.0 %" in html


def test_what_was_not_measured_is_left_out():
    content = synthetic_content()
    view = {k: v for k, v in content.view.items() if k not in ("retrieval", "probe")}
    view["null_control"] = {"skipped": "the data set has no split null_train"}
    bare = dataclasses.replace(
        content, view=view, searches={}, neighbours={}, bank={}, maps=(), planes=(), curves=()
    )
    html = render(bare)
    assert "Finding the other half" not in html
    assert "Linear probes" not in html
    assert "the data set has no split null_train" in html
    assert "Temporal tasks" in html


@pytest.mark.parametrize(
    ("modalities", "said"),
    [
        ("audio_visual", "Two encoders learned from unlabelled videos."),
        ("video", "A video encoder learned from unlabelled videos."),
        ("audio", "An audio encoder learned from unlabelled videos."),
    ],
)
def test_the_lead_names_the_encoders_of_the_run(modalities: str, said: str) -> None:
    assert lead(synthetic_content().view, modalities).startswith(said)


def test_the_retrieval_table_has_every_recall_that_was_asked_for() -> None:
    content = synthetic_content()
    scores = {"chance": 0.01, "median_rank": 9.0, "queries": 99, "gallery": 99}
    for k in (100, 1, 3):
        scores |= {f"r{k}": 0.5, f"chance_r{k}": 0.25}
    view = {**content.view, "retrieval": {"audio_to_video": scores}}
    html = render(dataclasses.replace(content, view=view))
    assert re.findall(r"R@(\d+) \(× chance\)", html) == ["1", "3", "100"]


def test_charts_are_the_same_from_run_to_run():
    series = {"a": (np.arange(100), np.sin(np.arange(100) / 9))}
    first = line_chart(series, name="chart", ylabel="loss")
    assert first == line_chart(series, name="chart", ylabel="loss")
    assert first != line_chart(series, name="other", ylabel="loss")


@pytest.mark.parametrize("rate", [4000, 16_000])
def test_clips_play_for_as_long_as_they_should(rate):
    rng = np.random.default_rng(5)
    uri = clip_uri(
        rng.integers(0, 255, size=(32, 16, 16, 3), dtype=np.uint8),
        fps=16.0,
        waveform=(3000 * rng.normal(size=2 * rate)).astype(np.int16),
        sample_rate_hz=rate,
    )
    data = io.BytesIO(base64.b64decode(uri.removeprefix("data:video/mp4;base64,")))
    with av.open(data) as container:
        seconds = {s.type: float(s.duration * s.time_base) for s in container.streams}
    assert seconds["video"] == pytest.approx(2.0)
    assert seconds["audio"] == pytest.approx(2.0, abs=0.1)


def test_only_all_of_them_is_written_as_a_hundred_percent():
    assert [as_text(v, digits=0) for v in (0.0, 0.005, 0.994, 0.995, 0.9996, 1.0)] == [
        "0 %",
        "0 %",
        "99 %",
        "99.5 %",
        "99.96 %",
        "100 %",
    ]


def test_values_are_written_in_their_unit_and_differences_with_their_sign():
    assert as_text(None) == "–"
    assert as_text(12.3456, "number") == "12.3"
    assert [as_text(v, signed=True) for v in (0.0123, -0.0001, -0.05)] == ["+1.2", "+0.0", "-5.0"]
    assert as_text(2.5, "number", signed=True) == "+2.5"
