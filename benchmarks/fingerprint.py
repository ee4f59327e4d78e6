"""Fingerprinting against alternatives that users have: `python -m benchmarks.fingerprint --json F`.

The protocol (avcl_jax/fingerprint/benchmark) measures retrieval, ours and the baselines on the
same queries; its reports stay in --workdir, and finished runs are not repeated. Each measurement of
speed has its own process. Needs a trained encoder (`make demo`),
`pip install -r benchmarks/requirements.txt`, and libchromaprint for one baseline.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.paths import local_path
from benchmarks import footage, measure
from benchmarks.measure import Measured, RowTable, SkipError, Target

_BASELINES = ("image_hash", "chromaprint")
_SEGMENTS, _SEGMENTS_PER_SOURCE = 100_000, 100
_QUERY_SECONDS = 10.0
_QUERIES = 5
_COLD_QUERY_SECONDS = 4.0
# Sixteen videos: enough that the scores are calibrated, which counts as indexing.
_VIDEOS: dict[str, Any] = {"per_source": 2, "seconds": 20.0, "short_side": 360}
_CLIPS = 20
# Settings of --small.
_SMALL = {
    "data.references": 4,
    "data.distractors": 2,
    "data.others": 1,
    "data.background": 2,
    "queries.weak": 1,
    "queries.medium": 1,
    "queries.strong": 1,
    "families": ("flip", "pitch", "audio_removed"),
    "bootstrap.resamples": 10,
}
_SMALL_REAL = {f"data.audio_clips.{role}": 2 for role in ("fillers", "distractors", "background")}


def protocol_results(preset: str, settings: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Runs the protocol by a preset with settings of dotted names, or reads its results."""
    from avcl_jax import experiment
    from avcl_jax.configs import fingerprint
    from avcl_jax.errors import UserError
    from avcl_jax.fingerprint.benchmark.protocol import fingerprinting

    config = fingerprint.get_config(preset)
    config.update_from_flattened_dict(settings)
    try:
        experiment.check_inputs(config)
        return fingerprinting(config, workdir) or {}
    except UserError as error:  # no records, or results with other settings exist
        return {"refused": str(error)}


def difference_of_recalls(
    workdir: Path, other: str, *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """R@1 of ours fused minus that of another method, with its interval over videos.

    Both methods have the same videos in every resample.
    """
    from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
    from avcl_jax.evaluation.statistics import compare

    outcomes = read_outcomes(workdir / OUTCOMES)
    rows = outcomes.values["medium_findable"]
    first, second = (
        [outcomes.values[key][rows] for key in (f"r1_{method}", "family")]
        for method in (other, "fused")
    )
    sources = np.array(outcomes.sources)[rows]
    compared = compare("class_mean", first, second, sources, resamples=resamples, seed=seed)
    return compared.difference


def seconds_of_query(encoder: str, clip: str, segments: int) -> list[float]:
    """Wall-clock seconds of warm queries, with decoding, against an index of this size.

    Features of the index are mixtures of those of real segments: as many neighbours and sources as
    in a library of that size.
    """
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.database import SourceRow, transaction
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.segments import SegmentFeatures
    from avcl_jax.fingerprint.settings import FingerprintSettings

    with tempfile.TemporaryDirectory() as directory:
        settings = FingerprintSettings()
        index = FingerprintIndex.create(Path(directory) / "index", encoder, settings)
        real = index.segmenter.of_file(clip)
        rng = np.random.default_rng(0)
        per = _SEGMENTS_PER_SOURCE
        seconds_per_source = per * settings.hop_seconds
        with transaction(index.directory, write=True) as stored:
            for number in range(segments // per):
                mixed = {}
                for modality, features in real.features.items():
                    known = features[real.present[modality]]
                    one, other = known[rng.integers(len(known), size=(2, per))]
                    weight = rng.uniform(size=(per, 1))
                    noise = known.std() * rng.standard_normal(one.shape)
                    mixed[modality] = (weight * one + (1 - weight) * other + noise).astype("f")
                present = {modality: np.ones(per, bool) for modality in mixed}
                row = SourceRow(f"source {number}", str(number), seconds_per_source, None)
                stored.insert(row, SegmentFeatures(mixed, present, seconds_per_source))
        index = FingerprintIndex.open(index.directory)
        assert index.num_segments == segments
        decoding = index.segmenter.decoding

        def query() -> None:
            index.query(decode_media(clip, end_seconds=_QUERY_SECONDS, **decoding))

        return measure.seconds_of_each(query, _QUERIES)


def seconds_of_import() -> float:
    """Wall-clock seconds of a process that only imports JAX."""
    command = [sys.executable, "-c", "import jax"]
    return measure.seconds_of(lambda: subprocess.run(command, check=True))


def seconds_of_command(*arguments: str, programs: Path) -> float:
    """Wall-clock seconds of `avcl-fingerprint`, which keeps compiled programs in a folder."""
    command = [sys.executable, "-m", "avcl_jax.fingerprint", *arguments]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(programs)}
    return measure.seconds_of(
        lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    )


def seconds_of_decoding(index: str, clip: str) -> float:
    """Wall-clock seconds to decode the clip of a cold query."""
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.index import FingerprintIndex

    decoding = FingerprintIndex.open(index).segmenter.decoding
    return measure.seconds_of(
        lambda: decode_media(clip, end_seconds=_COLD_QUERY_SECONDS, **decoding)
    )


def seconds_of_indexing(encoder: str, files: list[str], only_decode: bool) -> float:
    """Wall-clock seconds to index files, or only to decode them in the same way.

    The first file is encoded once before, so that compilation is not counted.
    """
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.settings import FingerprintSettings

    with tempfile.TemporaryDirectory() as directory:
        index = FingerprintIndex.create(Path(directory) / "index", encoder, FingerprintSettings())
        index.segmenter.of_file(files[0])

        def run() -> None:
            if only_decode:
                for path in files:
                    decode_media(path, **index.segmenter.decoding)
            else:
                report = index.add_files(map(Path, files))
                assert not report.failed, report.failed

        return measure.seconds_of(run)


class _Benchmark:
    """Measurements of all rows; some use the same runs of the protocol."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.results = functools.cache(self._results)

    def _results(self, preset: str) -> dict[str, Any]:
        """Results of the protocol by preset `foley` or `real`."""
        measure.need("faiss")
        args = self._args
        settings: dict[str, Any] = {
            "encoder": str(args.encoder),
            "data.directory": str(args.records),
        }
        settings |= _SMALL if args.small else {}
        folders = [args.encoder]
        if preset == "real":
            folders += [args.media, args.audio]
            settings |= {"data.files": str(args.media), "data.audio_files": str(args.audio)}
            settings |= _SMALL_REAL if args.small else {}
        for folder in folders:
            if not folder.is_dir():
                raise SkipError(
                    f"{folder} does not exist: run `make demo`, or give --encoder, --media, --audio"
                )
        workdir = str(self._workdir(preset))
        arguments = {"preset": preset, "settings": settings, "workdir": workdir}
        results = measure.run_child("benchmarks.fingerprint:protocol_results", arguments)
        if "refused" in results:
            raise SkipError(results["refused"])
        return results

    def _workdir(self, preset: str) -> Path:
        # Results of a smoke test are never mistaken for real ones.
        return Path(self._args.workdir, *(("small",) if self._args.small else ()), preset)

    def fused_r1(self, preset: str) -> Measured:
        """R@1 of ours fused with its interval; all other metrics are in the detail."""
        details = self.results(preset)["details"]
        tables = details["tables"]
        fused = tables["fused"]
        cell = fused["medium"]["all"]
        return cell["r1"], cell | {
            "interval": _interval(cell, "r1"),
            **_others(tables),
            "strengths": {s: cells["all"]["r1"] for s, cells in fused.items() if "all" in cells},
            "families": {f: c["r1"] for f, c in fused["medium"].items() if f != "all"},
            "clips": details["clips"],
            "skipped_baselines": details["skipped_baselines"],
            "report": str(self._workdir(preset) / "report.html"),
        }

    def error_ratio(self) -> Measured:
        """Fused error over that of the better single modality."""
        details = self.results("foley")["details"]
        value = details["fused_error_ratio"]
        if value is None:
            raise SkipError("the better single modality makes no error, so there is no ratio")
        cell = details["tables"]["fused"]["medium"]["all"]
        others = _others(details["tables"])
        best = 1 - max(others["modalities"].values())
        # Of the fused error alone: the error of the better modality is taken as exact.
        interval = [(1 - bound) / best for bound in _interval(cell, "r1")[::-1]]
        return value, others | {"interval": interval, "fused_r1": cell["r1"]}

    def minus_baseline(self) -> Measured:
        """R@1 of ours fused minus that of the better baseline, both means over families."""
        results = self.results("foley")
        if missing := results["details"]["skipped_baselines"]:
            raise SkipError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
        tables = results["details"]["tables"]
        others = _others(tables)
        best = max(others["baselines"], key=others["baselines"].__getitem__)
        by_family = {
            family: cell["r1"] - tables[best]["medium"][family]["r1"]
            for family, cell in tables["fused"]["medium"].items()
            if family != "all"
        }
        config = results["config"]
        difference, *interval = difference_of_recalls(
            self._workdir("foley"),
            best,
            resamples=config["bootstrap"]["resamples"],
            seed=config["seed"],
        )
        return difference, others | {"interval": interval, "best": best, "families": by_family}

    def at_threshold(self, name: str) -> Measured:
        """A metric at the default threshold."""
        cell = self.results("foley")["details"]["tables"]["fused"]["medium"]["all"]
        counts = {key: cell[key] for key in ("queries", "distractors")}
        return cell[name], {"interval": _interval(cell, name), **counts}

    def query_seconds(self) -> Measured:
        """Median seconds of a warm query."""
        measure.need("faiss")
        segments = 2000 if self._args.small else _SEGMENTS
        encoder, clip = str(self._args.encoder), str(self._clips()[0])
        arguments = {"encoder": encoder, "clip": clip, "segments": segments}
        seconds = measure.run_child("benchmarks.fingerprint:seconds_of_query", arguments)
        return float(np.median(seconds)), {"segments": segments, "seconds": measure.spread(seconds)}

    def cold_query(self) -> Measured:
        """Time of a query in a process of its own, less decoding, over that of importing JAX."""
        measure.need("faiss")
        clips = self._clips()[: 2 if self._args.small else None]
        with tempfile.TemporaryDirectory() as directory:
            index, programs = str(Path(directory) / "index"), Path(directory) / "programs"
            folder = [str(clip) for clip in clips]
            encoder = f"--encoder={self._args.encoder}"
            seconds_of_command("index", *folder, "--index", index, encoder, programs=programs)
            query = ("query", folder[-1], f"--max-seconds={_COLD_QUERY_SECONDS}", "--index", index)
            sides: dict[str, Callable[[], float]] = {
                "query": functools.partial(seconds_of_command, *query, programs=programs),
                "import": seconds_of_import,
            }
            seconds = measure.interleave(sides, repeats=self._args.repeats)
            arguments = {"index": index, "clip": folder[-1]}
            decoding = measure.run_child("benchmarks.fingerprint:seconds_of_decoding", arguments)
        seconds["query"] = [each - decoding for each in seconds["query"]]
        value, detail = measure.ratio(seconds, "query", "import", quantity="seconds")
        return value, {"media": len(clips), "decoding_seconds": decoding, **detail}

    def over_decoding(self) -> Measured:
        """Hours of video indexed per hour over hours decoded; the demo's clips in the detail."""
        measure.need("faiss")
        args = self._args
        if not args.media.is_dir():
            raise SkipError(f"{args.media} does not exist: give a folder of real videos by --media")
        small = {"per_source": 1, "seconds": 1.0} if args.small else {}
        videos = footage.make_videos(
            args.media,
            self._workdir("videos"),
            # FFmpeg's default distance of key frames: such videos are watched from the beginning.
            keyframe_seconds=10.0,
            **_VIDEOS | small,
        )
        value, detail = self._indexed_over_decoded(videos)
        clips = self._clips()[: 2 if args.small else _CLIPS]
        of_clips, detail_of_clips = self._indexed_over_decoded(clips)
        return value, detail | {"clips_as_the_demos": {"ratio": of_clips} | detail_of_clips}

    def _indexed_over_decoded(self, paths: Sequence[Path]) -> Measured:
        arguments = {"encoder": str(self._args.encoder), "files": [str(path) for path in paths]}

        def seconds_of(only_decode: bool) -> float:
            return measure.run_child(
                "benchmarks.fingerprint:seconds_of_indexing",
                {**arguments, "only_decode": only_decode},
            )

        sides = {
            "indexed": functools.partial(seconds_of, False),
            "decoded": functools.partial(seconds_of, True),
        }
        seconds = measure.interleave(sides, repeats=self._args.repeats)
        value, detail = measure.ratio(seconds, "decoded", "indexed", quantity="seconds")
        return value, {"files": len(paths), **detail}

    def _clips(self) -> list[Path]:
        folder = self._args.clips
        files = sorted(folder.glob("*.mp4"))
        if not files:
            raise SkipError(f"{folder} contains no MP4 files: run `make demo`, or give --clips")
        return files


def _interval(cell: Mapping[str, float], name: str) -> list[float]:
    return [cell[f"{name}_low"], cell[f"{name}_high"]]


def _others(tables: Mapping[str, Any]) -> dict[str, Any]:
    """R@1 of each single modality and each baseline, means over families."""
    return {
        kind: {name: tables[name]["medium"]["all"]["r1"] for name in names if name in tables}
        for kind, names in (("modalities", ("video", "audio")), ("baselines", _BASELINES))
    }


_ROWS: RowTable[_Benchmark] = {
    "foley_fused_r1": ("fraction", Target(">=", 0.95), lambda b: b.fused_r1("foley")),
    "fused_error_ratio": ("ratio", Target("<=", 0.7), _Benchmark.error_ratio),
    "fused_minus_best_baseline": ("fraction", Target(">=", 0.1), _Benchmark.minus_baseline),
    "real_fused_r1": ("fraction", Target(">=", 0.8), lambda b: b.fused_r1("real")),
    "false_match_rate": (
        *("fraction", Target("<=", 0.01)),
        lambda b: b.at_threshold("false_match_rate"),
    ),
    "recall_at_threshold": (
        *("fraction", Target(">=", 0.8)),
        lambda b: b.at_threshold("recall_at_threshold"),
    ),
    "query_seconds": ("s", Target("<=", 3), _Benchmark.query_seconds),
    "cold_query_over_import": ("ratio", Target("<=", 2.5), _Benchmark.cold_query),
    "index_over_decode_bound": ("ratio", Target(">=", 0.3), _Benchmark.over_decoding),
}
_FOLDERS = {
    "encoder": ("runs/demo", "run or exported encoders"),
    "records": ("data/foley_fingerprint/records", "clips like those of the demo"),
    "clips": ("data/foley/media/test", "folder of MP4 files"),
    "media": ("../shared/data/media", "folder of real videos"),
    "audio": ("../shared/data/esc10/audio", "audio files of ESC-10"),
    "workdir": ("runs/fingerprint", "reports of the protocol"),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("fingerprint", __doc__, rows=_ROWS, repeats=True)
    for name, (default, text) in _FOLDERS.items():
        parser.add_argument(f"--{name}", type=local_path, default=default, help=text)
    parser.add_argument("--small", action="store_true", help="smoke test without usable metrics")
    args = parser.parse_args(arguments)
    measure.measure_rows(_ROWS, args.rows, _Benchmark(args), args.json)


if __name__ == "__main__":
    measure.run_command(main)
