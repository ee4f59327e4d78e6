"""Families of media that share a template, drawn by code: slides, news, karaoke, screens.

The sources of a family differ in text and speech alone: the background, its motion and the music
are the same in all. Speech is by espeak-ng.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from avcl_jax.data.encode import write_mp4
from benchmarks.measure import SkipError

SECONDS = 12.0
_WIDTH, _HEIGHT = 640, 360
_AUDIO_HZ = 22_050  # espeak-ng's
_SAMPLES = round(SECONDS * _AUDIO_HZ)
_WORDS = {
    "adjective": (
        "early late small large quiet open linear hidden local global narrow simple random stable "
        "sparse dense northern central public recent sudden heavy modern ancient formal distant"
    ),
    "noun": (
        "model signal river harbour engine market station circuit village matrix theory filter "
        "planet window garden budget council species muscle enzyme border memory lesson bridge "
        "author pattern sample server climate kernel copper meadow summer ticket journey letter"
    ),
    "verb": (
        "changes follows supports measures moves describes crosses protects reaches replaces "
        "limits explains divides carries improves delays contains resembles covers predicts"
    ),
    "preposition": "near under after behind without before beside above through against",
}
_LONG = "the adjective noun verb the adjective noun preposition the noun"
_WHITE, _BLACK = (255, 255, 255), (20, 20, 20)
Colour = tuple[int, int, int]


class Source(NamedTuple):
    """One source of a family.

    Attributes:
        fps: rate of its frames.
        image_at: seconds -> uint8 [height, width, 3], RGB.
        waveform: int16 [samples], `SECONDS` long.
    """

    fps: int
    image_at: Callable[[float], np.ndarray]
    waveform: np.ndarray


def make_sources(family: str, folder: Path, numbers: range) -> list[Path]:
    """Writes sources of a family as MP4 files of `SECONDS`, unless they exist.

    Raises:
        SkipError: if espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise SkipError("espeak-ng is not installed: apt-get install espeak-ng")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{family}_{number:04d}.mp4" for number in numbers]

    def make(number: int, path: Path) -> None:
        if not path.exists():
            source = FAMILIES[family](number)
            times = (n / source.fps for n in range(round(SECONDS * source.fps)))
            write_mp4(
                path,
                ((seconds, source.image_at(seconds)) for seconds in times),
                source.waveform,
                fps=source.fps,
                sample_rate_hz=_AUDIO_HZ,
                audio_bits_per_second=96_000,
                video_options={"crf": "23", "preset": "veryfast", "threads": "1"},
            )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(make, numbers, paths))
    return paths


def slides(number: int) -> Source:
    """Draws a slide of one lecture, read and explained by its one speaker."""
    rng = np.random.default_rng((1, number))
    title, *points = (_sentence(rng, short=not n) for n in range(6))
    image = _slide_template().copy()
    _write(image, title.title(), (80, 42), 0.72, _WHITE)
    for row, point in enumerate(points):
        cv2.circle(image, (40, 103 + 45 * row), 4, (30, 70, 140), -1, cv2.LINE_AA)
        _write(image, point, (58, 110 + 45 * row), 0.58, _BLACK)
    _write(image, str(1 + number), (600, 350), 0.4, (110, 110, 110))
    speech = _speech([title, *points, _sentence(rng)], voice="en-gb")
    return Source(15, lambda _: image, _mixed(speech))


def news(number: int) -> Source:
    """Draws a report of one of four studios, each with its set, presenter and jingle."""
    rng, scene = np.random.default_rng((2, number)), number % 4
    sentences = [_sentence(rng) for _ in range(7)]
    still = _studio(scene).copy()
    _write(still, sentences[0].capitalize(), (36, 298), 0.55, _WHITE)
    strip = np.full((24, 3000, 3), (235, 200, 60), np.uint8)
    _write(strip, "  +++  ".join(sentences[1:]), (10, 17), 0.45, _BLACK)

    def image_at(seconds: float) -> np.ndarray:
        image = still.copy()
        sway = round(5 * math.sin((1.1 + 0.3 * scene) * seconds)), round(3 * math.sin(2 * seconds))
        _presenter(image, scene, sway, seconds)
        first = round(70 * seconds)
        image[-28:-4] = strip[:, first : first + _WIDTH]
        return image

    voice = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3")[scene]
    speech = _speech(sentences[1:], voice=voice, begin_seconds=1.5)
    return Source(25, image_at, _mixed(speech, _jingle(scene)))


def karaoke(number: int) -> Source:
    """Draws lyrics that are coloured as they are sung, over one moving background and one music."""
    rng = np.random.default_rng((3, number))
    lines = [_sentence(rng, short=True) for _ in range(8)]
    vocals = np.zeros(_SAMPLES, np.float32)
    for row, line in enumerate(lines):
        begin = round((0.2 + 1.5 * row) * _AUDIO_HZ)
        # The tune is that of all sources.
        sung = _spoken(line, "en-us+f2", words_per_minute=190, pitch=(40, 60, 75, 55)[row % 4])
        sung = sung[: round(1.5 * _AUDIO_HZ)]
        vocals[begin : begin + len(sung)] += sung[: len(vocals) - begin]

    def image_at(seconds: float) -> np.ndarray:
        image = _plasma(round(25 * seconds)).copy()
        current = min(int(max(seconds - 0.2, 0) / 1.5), len(lines) - 1)
        page = current - current % 2
        for row, line in enumerate(lines[page : page + 2]):
            done = min(max((seconds - 0.2 - 1.5 * (page + row)) / 1.2, 0.0), 1.0)
            (wide, _), _ = cv2.getTextSize(line, cv2.FONT_HERSHEY_DUPLEX, 0.8, 2)
            left, below = (_WIDTH - wide) // 2, 250 + 55 * row
            _write(image, line, (left, below), 0.8, _BLACK, thickness=6)
            sung = image.copy()
            _write(image, line, (left, below), 0.8, _WHITE, thickness=2)
            _write(sung, line, (left, below), 0.8, (255, 220, 0), thickness=2)
            split = left + round(done * wide)
            image[below - 40 : below + 15, :split] = sung[below - 40 : below + 15, :split]
        return image

    return Source(25, image_at, _mixed(vocals, _music()))


def screens(number: int) -> Source:
    """Draws an editor in which a program is typed, with a narrator and the clicks of the keys."""
    rng = np.random.default_rng((4, number))
    lines = [_code(rng) for _ in range(14)]
    keys = np.sort(rng.uniform(0.3, SECONDS, 110))
    typed = sum(map(len, lines[:7])) + np.arange(len(keys) + 1)
    ends = np.cumsum([len(line) for line in lines])
    path = rng.uniform(0.5, 1.5, 2), rng.uniform(0, 6, 2)

    def image_at(seconds: float) -> np.ndarray:
        image = _editor().copy()
        count = int(typed[np.searchsorted(keys, seconds)])
        for row, line in enumerate(lines):
            visible = line[: max(0, len(line) - int(ends[row] - count))]
            _write(image, visible, (170, 62 + 19 * row), 0.4, (212, 212, 190))
            if ends[row] - len(line) <= count < ends[row] and seconds % 1 < 0.5:
                right = 172 + cv2.getTextSize(visible, cv2.FONT_HERSHEY_DUPLEX, 0.4, 1)[0][0]
                cv2.rectangle(image, (right, 50 + 19 * row), (right + 6, 64 + 19 * row), _WHITE, -1)
        x, y = (np.sin(path[0] * seconds + path[1]) * (150, 90) + (400, 190)).astype(int).tolist()
        cv2.fillPoly(image, [np.array([(x, y), (x + 9, y + 9), (x, y + 13)])], _WHITE)
        return image

    clicks = np.zeros(_SAMPLES, np.float32)
    for key in keys:
        begin = round(key * _AUDIO_HZ)
        click = rng.normal(size=300) * np.exp(-np.arange(300) / 60) * 0.15
        clicks[begin : begin + 300] += click[: len(clicks) - begin]
    speech = _speech([_sentence(rng) for _ in range(6)], voice="en-us+m3", begin_seconds=0.4)
    return Source(15, image_at, _mixed(speech, clicks + _hum()))


FAMILIES: Mapping[str, Callable[[int], Source]] = {
    "slides": slides,
    "news": news,
    "karaoke": karaoke,
    "screens": screens,
}


def _sentence(rng: np.random.Generator, *, short: bool = False) -> str:
    form = "the adjective noun verb noun" if short else _LONG
    return " ".join(_word(rng, kind) if kind in _WORDS else kind for kind in form.split())


def _word(rng: np.random.Generator, kind: str) -> str:
    return str(rng.choice(_WORDS[kind].split()))


def _code(rng: np.random.Generator) -> str:
    first, second, third = (_word(rng, "noun") for _ in range(3))
    name, number = _word(rng, "adjective"), rng.integers(100)
    return (
        f"def {name}_{first}({second}, {third}):",
        f"    {first} = {second}.{name}({number})",
        f"    if {first} > {second}[{number}]:",
        f"        return {third} * {first}",
        f"    for {first} in range({number}):",
    )[rng.integers(5)]


def _write(
    image: np.ndarray,
    text: str,
    place: tuple[int, int],
    size: float,
    colour: Colour,
    *,
    thickness: int = 1,
) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_DUPLEX, size, colour, thickness, cv2.LINE_AA)


def _spoken(text: str, voice: str, *, words_per_minute: int = 165, pitch: int = 50) -> np.ndarray:
    """Returns speech, float32 [samples] in [-1, 1]."""
    options = ["-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout"]
    run = subprocess.run(["espeak-ng", *options, text], capture_output=True, check=True)
    # The header of a stream has no length.
    return np.frombuffer(run.stdout[44:], "<i2").astype(np.float32) / 32768


def _speech(sentences: list[str], *, voice: str, begin_seconds: float = 0.0) -> np.ndarray:
    """Returns speech of `SECONDS` that begins after some silence, float32."""
    spoken = _spoken(". ".join(sentences) + ".", voice)
    silence = np.zeros(round(begin_seconds * _AUDIO_HZ), np.float32)
    samples = np.concatenate([silence, spoken])[:_SAMPLES]
    return np.pad(samples, (0, _SAMPLES - len(samples)))


def _mixed(*parts: np.ndarray) -> np.ndarray:
    return (np.clip(sum(parts), -1, 1) * 32767).astype(np.int16)


@functools.cache
def _slide_template() -> np.ndarray:
    image = np.full((_HEIGHT, _WIDTH, 3), 250, np.uint8)
    image[:64] = (30, 70, 140)
    image[64:68] = (230, 150, 30)
    cv2.circle(image, (38, 32), 22, _WHITE, -1, cv2.LINE_AA)
    cv2.circle(image, (38, 32), 14, (230, 150, 30), -1, cv2.LINE_AA)
    image[332:334] = (180, 180, 180)
    _write(image, "Department of Science  -  Introduction", (30, 350), 0.4, (110, 110, 110))
    return image


@functools.cache
def _studio(scene: int) -> np.ndarray:
    rng = np.random.default_rng((5, scene))
    dark, light = rng.integers(10, 90, 3), rng.integers(90, 220, 3)
    ramp = np.linspace(0, 1, _WIDTH)[:, None]
    image = np.broadcast_to(dark + (light - dark) * ramp, (_HEIGHT, _WIDTH, 3)).astype(np.uint8)
    image = np.ascontiguousarray(image)
    for _ in range(25):  # a skyline
        left, wide, tall = rng.integers((0, 15, 30), (_WIDTH, 60, 150))
        shade = tuple(rng.integers(20, 160, 3).tolist())
        cv2.rectangle(image, (int(left), 230 - int(tall)), (int(left + wide), 230), shade, -1)
    image[230:] = dark
    image[272:310] = np.roll((170, 20, 30), scene)
    image[310:328] = _WHITE
    _write(image, f"CHANNEL {scene + 1}  LIVE", (36, 324), 0.45, _BLACK)
    return image


def _presenter(image: np.ndarray, scene: int, sway: tuple[int, int], seconds: float) -> None:
    x, y = (200, 320, 440, 260)[scene] + sway[0], 120 + sway[1]
    cv2.ellipse(image, (x, y + 150), (80, 100), 0, 180, 360, (40, 40, 60 + 40 * scene), -1)
    cv2.ellipse(image, (x, y), (34, 44), 0, 0, 360, (225, 180, 150), -1, cv2.LINE_AA)
    mouth = round(2 + 5 * abs(math.sin(9 * seconds)))
    cv2.ellipse(image, (x, y + 20), (11, mouth), 0, 0, 360, (120, 40, 40), -1, cv2.LINE_AA)


@functools.cache
def _plasma(number: int) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 6, 160), np.linspace(0, 3.4, 90))
    t = number / 25
    phases = (x + 0.9 * t, y * 1.7 - 1.3 * t, np.hypot(x - 3 - np.sin(t), y - 1.7) * 2.2 + t)
    image = np.stack([110 + 70 * np.sin(sum(phases) / 2 + k * x / 3) for k in range(3)], axis=-1)
    return cv2.resize(image.astype(np.uint8), (_WIDTH, _HEIGHT), interpolation=cv2.INTER_LINEAR)


@functools.cache
def _editor() -> np.ndarray:
    image = np.full((_HEIGHT, _WIDTH, 3), (30, 30, 34), np.uint8)
    image[:26] = (60, 60, 66)
    image[26:, :130] = (40, 40, 46)
    image[318:] = (20, 20, 22)
    image[318:320] = image[346:] = (0, 110, 190)
    _write(image, "File  Edit  View  Run  Help", (10, 18), 0.42, (220, 220, 220))
    for row, name in enumerate(("main", "model", "tests", "utils", "README", "setup")):
        _write(image, name, (16, 50 + 20 * row), 0.4, (190, 190, 190))
    for row in range(14):
        _write(image, f"{row + 1:2d}", (138, 62 + 19 * row), 0.36, (110, 110, 120))
    _write(image, "$ python -m tests", (140, 336), 0.4, (120, 220, 120))
    return image


def _tone(hertz: float, seconds: float) -> np.ndarray:
    times = np.arange(round(seconds * _AUDIO_HZ)) / _AUDIO_HZ
    return (np.sin(2 * np.pi * hertz * times) * np.exp(-4 * times)).astype(np.float32)


def _at(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Adds parts of the audio at their seconds."""
    total = np.zeros(_SAMPLES + _AUDIO_HZ, np.float32)
    for seconds, part in parts:
        begin = round(seconds * _AUDIO_HZ)
        total[begin : begin + len(part)] += part
    return total[:_SAMPLES]


@functools.cache
def _jingle(scene: int) -> np.ndarray:
    notes = np.random.default_rng((6, scene)).choice((262, 330, 392, 440, 523), 5)
    return _at([(0.25 * n, 0.3 * _tone(float(hertz), 0.5)) for n, hertz in enumerate(notes)])


@functools.cache
def _music() -> np.ndarray:
    rng = np.random.default_rng(7)
    chords = ((262, 330, 392), (392, 494, 587), (220, 262, 330), (349, 440, 523))
    parts = []
    for beat in range(round(SECONDS * 4)):
        chord = chords[beat // 8 % 4]
        parts.append((beat / 4, 0.12 * _tone(chord[beat % 3] * (1 + beat % 2), 0.6)))
        if beat % 4 == 0:
            parts.append((beat / 4, 0.2 * _tone(chord[0] / 4, 0.9)))
        if beat % 2:
            hiss = rng.normal(size=2000) * np.exp(-np.arange(2000) / 300)
            parts.append((beat / 4, (0.04 * hiss).astype(np.float32)))
    return _at(parts)


@functools.cache
def _hum() -> np.ndarray:
    rng = np.random.default_rng(8)
    noise = np.cumsum(rng.normal(size=_SAMPLES + 400))
    return (0.0004 * (noise[400:] - noise[:-400])).astype(np.float32)
