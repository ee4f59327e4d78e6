"""Fingerprinting against what people would use: `python -m benchmarks.fingerprint --json F`.

Retrieval is measured by the protocol of avcl_jax/fingerprint/benchmark/protocol.py, ours and the
baselines on the same queries; its reports stay in --workdir, and a run whose results are there is
not repeated. The speed rows measure every value in a process of its own. Needs a trained encoder
(`make demo`), `pip install -r benchmarks/requirements.txt`, and libchromaprint for one baseline.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

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
_SEGMENTS = 100_000
# Sixteen films: enough that the scores are calibrated, which counts as indexing.
_FILMS_PER_VIDEO = 2
_FILM_SECONDS = 20.0
_FILM_SIDE = 360
_CLIPS = 20
# What --small changes.
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
_SMALL_REAL = {f"data.sound_sets.{role}": 2 for role in ("fillers", "distractors", "background")}


def protocol_results(preset: str, settings: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Runs the protocol, or finds its results.

    Args:
        preset: of configs/fingerprint.py.
        settings: to change in it, by dotted names.
        workdir: of the results.
    """
    from avcl_jax import experiment
    from avcl_jax.errors import UserError
    from avcl_jax.fingerprint.benchmark.protocol import fingerprinting
    from configs import fingerprint

    config = fingerprint.get_config(preset)
    config.update_from_flattened_dict(settings)
    experiment.check_records(config)
    try:
        return fingerprinting(config, workdir) or {}
    except UserError as error:  # results of something else are there: for a person to decide
        return {"refused": str(error)}


def difference_of_recalls(
    workdir: str, other: str, *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """R@1 of ours fused minus that of another method, with its interval over videos.

    Args:
        workdir: of results of the protocol.
        other: method.
        resamples: of the bootstrap, in which both methods have the same videos.
        seed: of the draws.
    """
    from avcl_jax.evaluation.protocol import OUTCOMES, read_outcomes
    from avcl_jax.evaluation.statistics import compare

    outcomes = read_outcomes(epath.Path(workdir) / OUTCOMES)
    chosen = outcomes.values["medium_findable"]
    first, second = (
        [outcomes.values[key][chosen] for key in (f"r1_{method}", "family")]
        for method in (other, "fused")
    )
    sources = np.array(outcomes.sources)[chosen]
    found = compare("class_mean", first, second, sources, resamples=resamples, seed=seed)
    return found.difference


class _Benchmark:
    """Runs what several rows share once."""

    def __init__(self, args: argparse.Namespace):
        self._args = args

    @functools.cached_property
    def foley(self) -> dict[str, Any]:
        """Results of the protocol on clips as the demo's."""
        return self._results("foley", {})

    @functools.cached_property
    def real(self) -> dict[str, Any]:
        """Results of the protocol on real videos."""
        for folder in (self._args.media, self._args.sounds):
            if not folder.is_dir():
                raise SkipError(f"there is no {folder}: name the folder by --media and --sounds")
        folders = {"data.files": str(self._args.media), "data.sounds": str(self._args.sounds)}
        return self._results("real", folders | (_SMALL_REAL if self._args.small else {}))

    def _results(self, preset: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        need("faiss")
        args = self._args
        if not args.encoder.is_dir():
            raise SkipError(f"there is no {args.encoder}: run `make demo`, or name another")
        settings = {"encoder": str(args.encoder), "data.directory": str(args.records), **settings}
        if args.small:
            settings |= _SMALL
        results = run_child(
            "benchmarks.fingerprint:protocol_results",
            {"preset": preset, "settings": settings, "workdir": str(self._workdir(preset))},
        )
        if "refused" in results:
            raise SkipError(results["refused"])
        return results

    def _workdir(self, preset: str) -> Path:
        # A smoke test never stands where results are looked for.
        return Path(self._args.workdir, *(("small",) if self._args.small else ()), preset)

    def fused_r1(self, preset: str) -> tuple[float, dict[str, Any]]:
        """R@1 of ours fused with its interval, and of everything else beside it."""
        results = getattr(self, preset)
        tables = results["details"]["tables"]
        cell = tables["fused"]["medium"]["all"]
        detail = {
            "interval": [cell["r1_low"], cell["r1_high"]],
            **{key: cell[key] for key in ("queries", "distractors", "videos", "r5", "map")},
            **_others(tables),
            "strengths": {
                s: tables["fused"][s]["all"]["r1"]
                for s in tables["fused"]
                if "all" in tables["fused"][s]
            },
            "families": {f: c["r1"] for f, c in tables["fused"]["medium"].items() if f != "all"},
            **{
                name: [cell[name], cell[f"{name}_low"], cell[f"{name}_high"]]
                for name in ("recall_at_threshold", "false_match_rate")
            },
            "clips": results["details"]["clips"],
            "skipped_baselines": results["details"]["skipped_baselines"],
            "report": str(self._workdir(preset) / "report.html"),
        }
        return cell["r1"], detail

    def error_ratio(self) -> tuple[float, dict[str, Any]]:
        """Fused error over that of the better single modality."""
        ratio = self.foley["details"]["fused_error_ratio"]
        if ratio is None:
            raise SkipError(
                "the better single modality makes no error: there is nothing to divide by"
            )
        tables = self.foley["details"]["tables"]
        cell = tables["fused"]["medium"]["all"]
        best = 1 - max(_others(tables)["modalities"].values())
        # Of the fused error alone: that of the better modality is taken as it is.
        interval = [(1 - cell[bound]) / best for bound in ("r1_high", "r1_low")]
        return ratio, _others(tables) | {"interval": interval, "fused_r1": cell["r1"]}

    def minus_baseline(self) -> tuple[float, dict[str, Any]]:
        """R@1 of ours fused minus that of the better baseline, both means over families."""
        if missing := self.foley["details"]["skipped_baselines"]:
            raise SkipError("; ".join(f"{name}: {reason}" for name, reason in missing.items()))
        tables = self.foley["details"]["tables"]
        others = _others(tables)
        best = max(others["baselines"], key=others["baselines"].__getitem__)
        by_family = {
            family: cell["r1"] - tables[best]["medium"][family]["r1"]
            for family, cell in tables["fused"]["medium"].items()
            if family != "all"
        }
        difference = difference_of_recalls(
            str(self._workdir("foley")),
            best,
            resamples=self.foley["config"]["bootstrap"]["resamples"],
            seed=self.foley["config"]["seed"],
        )
        detail = others | {"interval": difference[1:], "best": best, "families": by_family}
        return difference[0], detail

    def at_threshold(self, name: str) -> tuple[float, dict[str, Any]]:
        """A figure at the default threshold."""
        cell = self.foley["details"]["tables"]["fused"]["medium"]["all"]
        return cell[name], {
            "interval": [cell[f"{name}_low"], cell[f"{name}_high"]],
            **{key: cell[key] for key in ("queries", "distractors")},
        }

    def query_seconds(self) -> tuple[float, dict[str, Any]]:
        """Median seconds of a warm query."""
        need("faiss")
        clip = str(self._files()[0])
        segments = 2000 if self._args.small else _SEGMENTS
        seconds = run_child(
            "benchmarks.fingerprint_speed:seconds_of_query",
            {
                "encoder": str(self._args.encoder),
                "clip": clip,
                "segments": segments,
                "kind": "auto",
            },
        )
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
        files = [str(path) for path in paths]

        def measure(only_decode: bool) -> float:
            return run_child(
                "benchmarks.fingerprint_speed:seconds_of_indexing",
                {"encoder": str(self._args.encoder), "files": files, "only_decode": only_decode},
            )

        sides = {
            "indexed": functools.partial(measure, False),
            "decoded": functools.partial(measure, True),
        }
        seconds = interleave(sides, repeats=self._args.repeats)
        return median_ratio(seconds["decoded"], seconds["indexed"]), {
            "files": len(files),
            **{f"seconds_{name}": spread(values) for name, values in seconds.items()},
        }

    def _files(self) -> list[Path]:
        folder = self._args.clips
        found = sorted(folder.glob("*.mp4"))
        if not found:
            raise SkipError(f"there are no MP4 files in {folder}: run `make demo`, or give --clips")
        return found


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


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fingerprint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    parser.add_argument(
        "--encoder", type=local_path, default="runs/demo", help="run or exported encoders"
    )
    parser.add_argument(
        "--records",
        type=local_path,
        default="data/foley_fingerprint/records",
        help="clips, made if absent",
    )
    parser.add_argument(
        "--clips", type=local_path, default="data/foley/media/test", help="folder of MP4 files"
    )
    parser.add_argument(
        "--media", type=local_path, default="../shared/data/media", help="folder of real videos"
    )
    parser.add_argument(
        "--sounds", type=local_path, default="../shared/data/esc10/audio", help="ESC-10's sounds"
    )
    parser.add_argument(
        "--workdir", type=local_path, default="runs/fingerprint", help="of the protocol's reports"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of the speed measurements")
    parser.add_argument("--small", action="store_true", help="a smoke test, whose figures are none")
    args = parser.parse_args(arguments)
    benchmark = _Benchmark(args)
    measure_rows(_ROWS, args.rows, benchmark, args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
