"""What fingerprinting is compared with: a baseline that fails for a bug would flatter ours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from avcl_jax.fingerprint.benchmark.searchers import CodeSearcher, chromaprint, image_hash
from avcl_jax.fingerprint.benchmark.timeline import excerpt
from tests.fingerprint.benchmark.clips import FPS, SECONDS, clip

STEP_SECONDS = 0.25


def codes_of(seed: int, moments: int = 80) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63, (moments, 1), dtype=np.uint64)


def plain() -> CodeSearcher:
    """A searcher of codes that are given, instead of a clip."""
    return CodeSearcher("plain", lambda media: media, STEP_SECONDS, chance_bits=24.0, answers=5)


def search(searcher: CodeSearcher, *variants: np.ndarray):
    return searcher.search(searcher._references, variants)


@pytest.fixture
def library():
    searcher = plain()
    searcher.index(((f"r{seed}", codes_of(seed)) for seed in range(5)), ())
    return searcher


@pytest.mark.parametrize("rate", [1.0, 0.8, 1.25])
def test_a_piece_is_found_where_it_begins_at_every_rate(library, rate):
    piece = codes_of(3)[20 + np.rint(rate * np.arange(16)).astype(int)]
    first, second, *_ = search(library, piece ^ np.uint64(0b111111))  # six bits are wrong
    assert (first.source, first.offset_seconds) == ("r3", 20 * STEP_SECONDS)
    assert first.score == pytest.approx(1 - 6 / 24)  # a quarter of what chance leaves is wrong
    assert second.score < 0.3


def test_what_reaches_beyond_the_source_is_found_by_the_rest(library):
    piece = np.concatenate([codes_of(77, 24), codes_of(1)[:24]])
    answer = search(library, piece)[0]
    assert (answer.source, answer.offset_seconds) == ("r1", -24 * STEP_SECONDS)
    assert answer.score == pytest.approx(0.5, abs=0.05)


def test_the_better_variant_counts_and_nothing_finds_nothing(library):
    found = search(library, codes_of(99)[:16], codes_of(4)[:16])
    assert found[0].source == "r4"
    assert len({answer.source for answer in found}) == len(found) == 5
    assert search(library, codes_of(0)[:0]) == []
    assert search(plain(), codes_of(0)) == []


def indexed(searcher):
    references = [(f"clip {seed}", clip(seed)) for seed in range(1, 5)]
    searcher.index(iter(references), iter([("background", clip(9))]))
    return searcher


def test_image_hash_finds_a_brighter_mirrored_piece_and_not_by_audio():
    pytest.importorskip("imagehash")
    searcher = indexed(image_hash(answers=2))
    query = excerpt(clip(3), 2.0, 5.0)
    changed = np.clip(query.frames[:, :, ::-1].astype(int) + 20, 0, 255).astype(np.uint8)
    ranking = searcher.query(dataclasses.replace(query, frames=changed))["image_hash"]
    assert ranking.answers[0].source == "clip 3"
    assert ranking.answers[0].offset_seconds == pytest.approx(2.0, abs=1 / FPS)
    assert ranking.answers[0].score > 0.7 > ranking.answers[1].score
    assert ranking.background < ranking.answers[0].score
    assert searcher.query(excerpt(clip(3, video=False), 2.0, 5.0))["image_hash"].answers == []


def test_frames_of_one_colour_resemble_nothing_not_even_each_other():
    pytest.importorskip("imagehash")
    searcher = image_hash(answers=2)
    black = dataclasses.replace(clip(1), frames=np.zeros_like(clip(1).frames))
    searcher.index(iter([("clip 2", clip(2)), ("black", black)]), iter([]))
    assert searcher.query(black)["image_hash"].answers[0].score < 0.3


def test_chromaprint_finds_a_quieter_piece_and_not_by_video():
    pytest.importorskip("chromaprint", exc_type=ImportError)
    searcher = indexed(chromaprint(answers=2))
    query = excerpt(clip(2), 1.0, SECONDS)
    quiet = dataclasses.replace(query, waveform=(query.waveform * 0.3).astype(np.int16))
    answer = searcher.query(quiet)["chromaprint"].answers[0]
    assert answer.source == "clip 2"
    assert answer.offset_seconds == pytest.approx(1.0, abs=0.15)
    assert searcher.query(excerpt(clip(2, audio=False), 1.0, 5.0))["chromaprint"].answers == []
