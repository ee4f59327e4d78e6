"""Excerpts of media that share a template: `python -m benchmarks.look_alikes --json F`.

An index of one family of look-alikes (benchmarks/templates.py) is asked for re-encoded excerpts of
its sources, for excerpts of others that it does not contain, and for excerpts of other families.
`avcl_jax/fingerprint/details.py` was developed with media like `slides` and `news`, and without
any like `karaoke` and `screens`. Needs a trained encoder (`make demo`) and espeak-ng.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avcl_jax.data.encode import write_mp4
from avcl_jax.data.media import decode_media
from avcl_jax.paths import local_path
from benchmarks import measure, templates
from benchmarks.measure import Measured, RowTable, SkipError, Target

# Sources in the index of each family.
_SOURCES = {"slides": 200, "news": 60, "karaoke": 60, "screens": 60}
_QUERIES = 30
_SMALL_SOURCES, _SMALL_QUERIES = 16, 4
_TOLERANCE_SECONDS = 0.5
# Least and greatest length of excerpts of indexed sources, and of others.
_LENGTHS, _LENGTHS_OF_OTHERS = (3.0, 6.0), (2.5, 9.0)
# How excerpts are encoded.
_SHORT_SIDE, _QUALITY, _AUDIO_BITS, _AUDIO_HZ = 270, "33", 32_000, 22_050


class _Excerpt(NamedTuple):
    path: Path
    source: Path
    begin_seconds: float


class _Benchmark:
    """Answers of the index of each family; several rows use the same ones."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.answers = functools.cache(self._answers)

    def _answers(self, family: str) -> dict[str, Any]:
        from avcl_jax.fingerprint.index import FingerprintIndex
        from avcl_jax.fingerprint.settings import FingerprintSettings

        measure.need("faiss")
        args = self._args
        if not args.encoder.is_dir():
            raise SkipError(f"{args.encoder} does not exist: run `make demo`, or give --encoder")
        count = _SMALL_SOURCES if args.small else _SOURCES[family]
        indexed = templates.make_sources(family, args.workdir / family, range(count))
        own, others = self._excerpts(family, count)
        unrelated = [
            excerpt
            for name in templates.FAMILIES
            if name != family
            for excerpt in self._excerpts(name, 0)[1][: 2 if args.small else 10]
        ]
        with tempfile.TemporaryDirectory() as directory:
            index = FingerprintIndex.create(
                Path(directory) / "index", args.encoder, FingerprintSettings()
            )
            report = index.add_files(indexed)
            assert not report.failed, report.failed

            def ask(excerpt: _Excerpt) -> dict[str, Any]:
                result = index.query(decode_media(excerpt.path, **index.segmenter.decoding))
                first = result.matches[0] if result.matches else None
                error = first.offset_seconds - excerpt.begin_seconds if first else np.inf
                right = (
                    first is not None
                    and first.source == str(excerpt.source)
                    and abs(error) <= _TOLERANCE_SECONDS
                )
                return {
                    "query": excerpt.path.name,
                    "seconds": round(result.query_seconds, 2),
                    "first": first and Path(first.source).name,
                    "offset_error": round(error, 3),
                    "right": right,
                    "accepted": [Path(name).name for name in result.sources],
                    "verdict": result.verdict,
                    "score": round(first.score if first else 0.0, 2),
                }

            asked = {"own": own, "others": others, "unrelated": unrelated}
            return {name: list(map(ask, excerpts)) for name, excerpts in asked.items()}

    def _excerpts(self, family: str, indexed: int) -> tuple[list[_Excerpt], list[_Excerpt]]:
        """Makes excerpts of indexed sources, and of as many others, unless they exist."""
        count = _SMALL_QUERIES if self._args.small else _QUERIES
        folder = self._args.workdir / family
        # The others are the same whatever the index contains.
        first_other = max(_SOURCES.values())
        others = range(first_other, first_other + count)
        own = np.linspace(0, indexed - 1, count).round().astype(int).tolist() if indexed else []
        made = []
        for numbers, lengths in ((own, _LENGTHS), (others, _LENGTHS_OF_OTHERS)):
            excerpts = []
            for n, number in enumerate(numbers):
                (source,) = templates.make_sources(family, folder, range(number, number + 1))
                rng = np.random.default_rng((9, number))
                seconds = lengths[0] + (lengths[1] - lengths[0]) * n / max(count - 1, 1)
                begin = float(rng.uniform(0, templates.SECONDS - seconds))
                path = folder / "queries" / f"{source.stem}_{begin:.2f}_{seconds:.2f}.mp4"
                if not path.exists():
                    _reencode(source, path, begin, seconds)
                excerpts.append(_Excerpt(path, source, begin))
            made.append(excerpts)
        return made[0], made[1]

    def accepted(self, family: str) -> Measured:
        """Fraction of excerpts for which their source, at the right offset, alone is accepted."""
        answers = self.answers(family)
        own = answers["own"]
        right = [a["right"] and a["accepted"] == [a["first"]] for a in own]
        errors = [abs(a["offset_error"]) for a in own if a["right"]]
        return float(np.mean(right)), {
            "held_out": family in HELD_OUT,
            "queries": len(own),
            "accepted": sum(right),
            "first": sum(a["right"] for a in own),
            "largest_offset_error": max(errors, default=None),
            "wrong_accepted": sum(bool(set(a["accepted"]) - {a["first"]}) for a in own),
            "answers": own,
        }

    def others_accepted(self, family: str) -> Measured:
        """Number of excerpts of sources that are not indexed for which any source is accepted."""
        answers = self.answers(family)
        asked = answers["others"] + answers["unrelated"]
        counts = {
            f"{name}_{what}": value
            for name in ("others", "unrelated")
            for what, value in (
                ("queries", len(answers[name])),
                ("highest_score", max((a["score"] for a in answers[name]), default=0.0)),
            )
        }
        accepted = [a for a in asked if a["accepted"]]
        return float(len(accepted)), {"held_out": family in HELD_OUT, **counts, "answers": asked}


HELD_OUT = ("karaoke", "screens")
_ROWS: RowTable[_Benchmark] = {
    **{
        family: (
            *("fraction", Target(">=", 0.83)),
            functools.partial(lambda f, b: b.accepted(f), family),
        )
        for family in templates.FAMILIES
    },
    **{
        f"{family}_others": (
            *("queries", Target("<=", 0)),
            functools.partial(lambda f, b: b.others_accepted(f), family),
        )
        for family in templates.FAMILIES
    },
}


def _reencode(source: Path, path: Path, begin_seconds: float, seconds: float) -> None:
    """Writes an excerpt as somebody who shares it would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    media = decode_media(
        source,
        short_side=_SHORT_SIDE,
        max_fps=None,
        sample_rate_hz=_AUDIO_HZ,
        start_seconds=begin_seconds,
        end_seconds=begin_seconds + seconds,
    )
    write_mp4(
        path,
        zip(media.frame_seconds.tolist(), media.frames, strict=True),
        media.waveform,
        fps=media.fps,
        variable_rate=True,
        sample_rate_hz=media.sample_rate_hz,
        audio_start_seconds=media.audio_start_seconds,
        audio_bits_per_second=_AUDIO_BITS,
        video_options={"crf": _QUALITY, "threads": "1"},
    )


def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("look_alikes", __doc__, rows=_ROWS)
    parser.add_argument(
        "--encoder", type=local_path, default="runs/demo", help="run or exported encoders"
    )
    parser.add_argument(
        "--workdir", type=local_path, default="runs/look_alikes", help="media, made once and kept"
    )
    parser.add_argument("--small", action="store_true", help="smoke test without usable metrics")
    args = parser.parse_args(list(arguments))
    measure.measure_rows(_ROWS, args.rows, _Benchmark(args), args.json)


if __name__ == "__main__":
    measure.run_command(main)
