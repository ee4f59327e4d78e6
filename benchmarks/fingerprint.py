"""Fingerprinting against what people would use: `python -m benchmarks.fingerprint --json F`.

Retrieval is measured by the protocol (avcl_jax/fingerprint/benchmark), ours and the baselines on
the same queries; its reports stay in --workdir, and a run whose results are there is not repeated.
The speed rows measure every value in a process of its own. Needs a trained encoder (`make demo`),
`pip install -r benchmarks/requirements.txt`, and libchromaprint for one baseline.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.paths import local_path
from benchmarks import footage
from benchmarks.measure import (
    REPEATS,
    SkipError,
    Target,
    interleave,
    measure_rows,
    median_ratio,
    need,
    run_child,
    run_command,
    spread,
    writable_path,
)

_BASELINES = ("image_hash", "chromaprint")
_SEGMENTS, _SEGMENTS_PER_SOURCE = 100_000, 100
_QUERY_SECONDS = 10.0
_WARM_QUERIES = 5
# Sixteen films: enough that the scores are calibrated, which counts as indexing.
_FILMS_PER_VIDEO = 2
_FILM_SECONDS = 20.0
_FILM_SIDE = 360
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
    """Runs the protocol by a preset with settings of dotted names, or finds its results."""
    from avcl_jax import experiment
    from avcl_jax.errors import UserError
    from avcl_jax.fingerprint.benchmark.protocol import fingerprinting
    from configs import fingerprint

    config = fingerprint.get_config(preset)
    config.update_from_flattened_dict(settings)
    try:
        experiment.check_records(config)
        return fingerprinting(config, workdir) or {}
    except UserError as error:  # no records, or results of something else are there
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
    """Wall-clock seconds of warm queries, decoding included, against an index of this size.

    Features of the index are mixtures of those of real segments: as many neighbours, of as many
    sources, as in a library of that size.
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
        seconds = []
        for _ in range(1 + _WARM_QUERIES):
            begin = time.perf_counter()
            index.query(decode_media(clip, end_seconds=_QUERY_SECONDS, **index.segmenter.decoding))
            seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def seconds_of_indexing(encoder: str, files: list[str], only_decode: bool) -> float:
    """Wall-clock seconds in which files are indexed, or only decoded in the same way.

    The first file is encoded once before, so that compiling is not counted.
    """
    from avcl_jax.data.media import decode_media
    from avcl_jax.fingerprint.index import FingerprintIndex
    from avcl_jax.fingerprint.settings import FingerprintSettings

    with tempfile.TemporaryDirectory() as directory:
        index = FingerprintIndex.create(Path(directory) / "index", encoder, FingerprintSettings())
        index.segmenter.of_file(files[0])
        begin = time.perf_counter()
        if only_decode:
            for path in files:
                decode_media(path, **index.segmenter.decoding)
        else:
            report = index.add_files(map(Path, files))
            assert not report.failed, report.failed
        return time.perf_counter() - begin


class _Benchmark:
    """Rows, and runs of the protocol that several of them share."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self.results = functools.cache(self._results)

    def _results(self, preset: str) -> dict[str, Any]:
        """Returns the results of the protocol by preset `foley` or `real`."""
        need("faiss")
        args = self._args
        if not args.encoder.is_dir():
            raise SkipError(f"there is no {args.encoder}: run `make demo`, or name another")
        settings: dict[str, Any] = {"encoder": str(args.encoder)}
        settings["data.directory"] = str(args.records)
        settings |= _SMALL if args.small else {}
        if preset == "real":
            for folder in (args.media, args.sounds):
                if not folder.is_dir():
                    raise SkipError(
                        f"there is no {folder}: name the folder by --media and --sounds"
                    )
            settings |= {"data.files": str(args.media), "data.audio_files": str(args.sounds)}
            settings |= _SMALL_REAL if args.small else {}
        workdir = str(self._workdir(preset))
        arguments = {"preset": preset, "settings": settings, "workdir": workdir}
        results = run_child("benchmarks.fingerprint:protocol_results", arguments)
        if "refused" in results:
            raise SkipError(results["refused"])
        return results

    def _workdir(self, preset: str) -> Path:
        # A smoke test is never where results are looked for.
        return Path(self._args.workdir, *(("small",) if self._args.small else ()), preset)

    def fused_r1(self, preset: str) -> tuple[float, dict[str, Any]]:
        """R@1 of ours fused with its interval, and all other metrics beside it."""
        details = self.results(preset)["details"]
        tables = details["tables"]
        fused = tables["fused"]
        cell = fused["medium"]["all"]
        detail = cell | {
            "interval": _interval(cell, "r1"),
            **_others(tables),
            "strengths": {s: cells["all"]["r1"] for s, cells in fused.items() if "all" in cells},
            "families": {f: c["r1"] for f, c in fused["medium"].items() if f != "all"},
            "clips": details["clips"],
            "skipped_baselines": details["skipped_baselines"],
            "report": str(self._workdir(preset) / "report.html"),
        }
        return cell["r1"], detail

    def error_ratio(self) -> tuple[float, dict[str, Any]]:
        """Fused error over that of the better single modality."""
        details = self.results("foley")["details"]
        ratio = details["fused_error_ratio"]
        if ratio is None:
            raise SkipError(
                "the better single modality makes no error: there is nothing to divide by"
            )
        cell = details["tables"]["fused"]["medium"]["all"]
        others = _others(details["tables"])
        best = 1 - max(others["modalities"].values())
        # Of the fused error alone: that of the better modality is taken as it is.
        interval = [(1 - bound) / best for bound in _interval(cell, "r1")[::-1]]
        return ratio, others | {"interval": interval, "fused_r1": cell["r1"]}

    def minus_baseline(self) -> tuple[float, dict[str, Any]]:
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

    def at_threshold(self, name: str) -> tuple[float, dict[str, Any]]:
        """A metric at the default threshold."""
        cell = self.results("foley")["details"]["tables"]["fused"]["medium"]["all"]
        counts = {key: cell[key] for key in ("queries", "distractors")}
        return cell[name], {"interval": _interval(cell, name), **counts}

    def query_seconds(self) -> tuple[float, dict[str, Any]]:
        """Median seconds of a warm query."""
        need("faiss")
        segments = 2000 if self._args.small else _SEGMENTS
        encoder, clip = str(self._args.encoder), str(self._files()[0])
        arguments = {"encoder": encoder, "clip": clip, "segments": segments}
        seconds = run_child("benchmarks.fingerprint:seconds_of_query", arguments)
        return float(np.median(seconds)), {"segments": segments, "seconds": spread(seconds)}

    def over_decoding(self) -> tuple[float, dict[str, Any]]:
        """Hours of film indexed an hour over hours decoded an hour; the demo's clips beside it."""
        need("faiss")
        args = self._args
        if not args.media.is_dir():
            raise SkipError(f"there is no {args.media}: name a folder of real videos by --media")
        films = footage.make_films(
            args.media,
            self._workdir("films"),
            per_video=1 if args.small else _FILMS_PER_VIDEO,
            seconds=1.0 if args.small else _FILM_SECONDS,
            short_side=_FILM_SIDE,
        )
        ratio, detail = self._indexed_over_decoded(films)
        clips = self._files()[: 2 if args.small else _CLIPS]
        of_clips, detail_of_clips = self._indexed_over_decoded(clips)
        return ratio, detail | {"clips_as_the_demos": {"ratio": of_clips} | detail_of_clips}

    def _indexed_over_decoded(self, paths: Sequence[Path]) -> tuple[float, dict[str, Any]]:
        arguments = {"encoder": str(self._args.encoder), "files": [str(path) for path in paths]}

        def measure(only_decode: bool) -> float:
            return run_child(
                "benchmarks.fingerprint:seconds_of_indexing",
                {**arguments, "only_decode": only_decode},
            )

        sides = {
            "indexed": functools.partial(measure, False),
            "decoded": functools.partial(measure, True),
        }
        seconds = interleave(sides, repeats=self._args.repeats)
        return median_ratio(seconds["decoded"], seconds["indexed"]), {
            "files": len(paths),
            **{f"seconds_{name}": spread(values) for name, values in seconds.items()},
        }

    def _files(self) -> list[Path]:
        folder = self._args.clips
        files = sorted(folder.glob("*.mp4"))
        if not files:
            raise SkipError(f"there are no MP4 files in {folder}: run `make demo`, or give --clips")
        return files


def _interval(cell: Mapping[str, float], name: str) -> list[float]:
    return [cell[f"{name}_low"], cell[f"{name}_high"]]


def _others(tables: Mapping[str, Any]) -> dict[str, Any]:
    """R@1 of each single modality and each baseline, means over families."""
    return {
        kind: {name: tables[name]["medium"]["all"]["r1"] for name in names if name in tables}
        for kind, names in (("modalities", ("video", "audio")), ("baselines", _BASELINES))
    }


_Measurement = Callable[[_Benchmark], tuple[float, dict[str, Any]]]
_ROWS: dict[str, tuple[str, Target | None, _Measurement]] = {
    "foley_fused_r1": ("share", Target(">=", 0.95), lambda b: b.fused_r1("foley")),
    "fused_error_ratio": ("ratio", Target("<=", 0.7), _Benchmark.error_ratio),
    "fused_minus_best_baseline": ("share", Target(">=", 0.1), _Benchmark.minus_baseline),
    "real_fused_r1": ("share", Target(">=", 0.8), lambda b: b.fused_r1("real")),
    "false_match_rate": ("share", Target("<=", 0.01), lambda b: b.at_threshold("false_match_rate")),
    "recall_at_threshold": (
        *("share", Target(">=", 0.8)),
        lambda b: b.at_threshold("recall_at_threshold"),
    ),
    "query_seconds": ("s", Target("<=", 3), _Benchmark.query_seconds),
    "index_over_decode_bound": ("ratio", Target(">=", 0.3), _Benchmark.over_decoding),
}
_FOLDERS = {
    "encoder": ("runs/demo", "run or exported encoders"),
    "records": ("data/foley_fingerprint/records", "clips as the demo's"),
    "clips": ("data/foley/media/test", "folder of MP4 files"),
    "media": ("../shared/data/media", "folder of real videos"),
    "sounds": ("../shared/data/esc10/audio", "audio files of ESC-10"),
    "workdir": ("runs/fingerprint", "folder of the protocol's reports"),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fingerprint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="file of the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    for name, (default, text) in _FOLDERS.items():
        parser.add_argument(f"--{name}", type=local_path, default=default, help=text)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of the speed measurements")
    parser.add_argument("--small", action="store_true", help="a smoke test, whose metrics are none")
    args = parser.parse_args(arguments)
    measure_rows(_ROWS, args.rows, _Benchmark(args), args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
