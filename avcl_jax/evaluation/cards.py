"""Videos of the report: rows of cards with stills, spectrogram and a clip that plays."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from fractions import Fraction

import av
import cv2
import librosa
import matplotlib
import numpy as np
import simplejpeg

from avcl_jax.evaluation.page import text
from avcl_jax.evaluation.report_content import Exhibit, Search, Side

# Sample rates in use that AAC supports. FFmpeg's resampling before its encoder yields time stamps
# that its muxer refuses.
_AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


def search_blocks(
    by_title: Mapping[str, Sequence[Search]], spectrogram_range: tuple[float, float]
) -> list[str]:
    """Returns the HTML of titled searches: for each title a heading and its rows of cards.

    Args:
        by_title: title → searches.
        spectrogram_range: values drawn darkest and brightest.
    """
    blocks = []
    for title, searches in by_title.items():
        blocks.append(f"<h3>{text(title)}</h3>")
        blocks += [search_row(search, spectrogram_range) for search in searches]
    return blocks


def search_row(search: Search, spectrogram_range: tuple[float, float]) -> str:
    """Returns the HTML of a query and its results; `spectrogram_range` as in `search_blocks`."""
    query_tag = "anchor" if search.tags else "query"
    cards = [_card(search.query, search.query_modality, "query", query_tag, spectrogram_range)]
    for number, (exhibit, hit) in enumerate(zip(search.found, search.hits, strict=True), start=1):
        kind = "hit" if hit else ""
        tag = f"{number} · same video" if hit else str(number)
        tag = search.tags[number - 1] if search.tags else tag
        cards.append(_card(exhibit, search.found_modality, kind, tag, spectrogram_range))
    remark = f'<p class="caption">{text(search.remark)}</p>' if search.remark else ""
    return f'<div class="scroll"><div class="row">{"".join(cards)}</div></div>{remark}'


def _card(
    exhibit: Exhibit,
    modality: Side,
    kind: str,
    tag: str,
    spectrogram_range: tuple[float, float],
) -> str:
    low, high = spectrogram_range
    media = ""
    if len(exhibit.stills):
        stills = "".join(f'<img alt="" src="{picture_uri(s)}">' for s in exhibit.stills)
        unseen = " unseen" if modality == "audio" else ""
        media += f'<span class="stills{unseen}">{stills}</span>'
    if len(exhibit.spectrogram):
        uri = spectrogram_uri(exhibit.spectrogram, low=low, high=high)
        unseen = ' class="unseen"' if modality == "video" else ""
        media += f'<img alt="spectrogram"{unseen} src="{uri}">'
    clip = f'data-clip="{exhibit.clip}" aria-label="play {text(exhibit.name)}"'
    labels = text(exhibit.labels)
    return (
        f'<div class="video {kind}">'
        f'<span class="tag"><b>{text(tag)}</b> {text(exhibit.name)}</span>'
        f'<button class="stage" {clip if exhibit.clip else "disabled"}>{media}</button>'
        f'<span class="tag" title="{labels}">{labels}</span></div>'
    )


def picture_uri(picture: np.ndarray) -> str:
    """Returns a JPEG data URI of a uint8 [H, W, 3] picture."""
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def spectrogram_uri(spectrogram: np.ndarray, *, low: float, high: float) -> str:
    """Returns a PNG data URI of a log-mel spectrogram, time to the right and low pitch below.

    Args:
        spectrogram: float [F, M].
        low: value drawn darkest.
        high: value drawn brightest.
    """
    scaled = np.clip((spectrogram - low) / max(high - low, 1e-9), 0.0, 1.0)
    colours = matplotlib.colormaps["magma"](scaled.T[::-1], bytes=True)[..., 2::-1]
    _, data = cv2.imencode(".png", np.ascontiguousarray(colours))
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode("ascii")


def clip_uri(frames: np.ndarray, *, fps: float, waveform: np.ndarray, sample_rate_hz: int) -> str:
    """Returns an MP4 data URI (H.264 and AAC) of a short clip, so that the page can play it.

    Args:
        frames: uint8 [T, H, W, 3], even height and width; empty for audio alone.
        fps: frames per second.
        waveform: int16 [samples]; empty for a silent clip.
        sample_rate_hz: sample rate of the waveform.
    """
    if len(waveform) and sample_rate_hz not in _AAC_RATES:
        resampled = librosa.resample(
            waveform.astype(np.float32), orig_sr=sample_rate_hz, target_sr=16_000
        )
        waveform, sample_rate_hz = np.clip(resampled, -32768, 32767).astype(np.int16), 16_000
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        if len(frames):
            video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "yuv420p"
            video.options = {"crf": "26", "preset": "veryfast", "threads": "1"}
        if len(waveform):
            audio = container.add_stream("aac", rate=sample_rate_hz, layout="mono")
            audio.bit_rate = 32_000
        if len(frames):
            for frame in frames:
                for packet in video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                    container.mux(packet)
            for packet in video.encode():
                container.mux(packet)
        if len(waveform):
            samples = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
            samples.sample_rate = sample_rate_hz
            for packet in [*audio.encode(samples), *audio.encode()]:
                container.mux(packet)
    return "data:video/mp4;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
