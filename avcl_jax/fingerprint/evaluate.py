"""`avcl-fingerprint evaluate`: metrics of the answers to queries whose sources are known."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from avcl_jax.compilation_cache import keep_compiled
from avcl_jax.data.media import MediaError, decode_media, probe
from avcl_jax.data.media_files import media_files
from avcl_jax.data.media_streams import check_regular
from avcl_jax.errors import one_line, printable
from avcl_jax.fingerprint.ground_truth import (
    Curve,
    Names,
    Pair,
    Segment,
    pair_curve,
    read_segments,
    segment_curve,
)
from avcl_jax.fingerprint.index import FingerprintIndex
from avcl_jax.fingerprint.matching import CANDIDATES
from avcl_jax.fingerprint.settings import THRESHOLD, FingerprintError
from avcl_jax.paths import local_path

_PRECISION = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add = parser.add_argument
    queries = "media files, or folders with media; those without ground truth must find nothing"
    add("--queries", help=queries, nargs="+", type=local_path, required=True, metavar="PATH")
    columns = "CSV with query_id, ref_id, query_start, query_end, ref_start, ref_end"
    add("--ground-truth", help=columns, type=local_path, required=True, metavar="CSV")
    add("--json", action="store_true", help="answer in JSON")
    add("--encoder", metavar="PATH", help="where the encoders are now, if they were moved")
    seconds = "seconds of each query that are compared, all in memory (default: %(default)s)"
    add("--max-seconds", type=float, default=120.0, help=seconds)


def run(args: argparse.Namespace) -> int:
    """Prints the metrics; returns 1 if a query could not be compared, which finds nothing."""
    queries = media_files(args.queries)
    index = FingerprintIndex.open(args.index, args.encoder)
    sources = {source.name: source.duration_seconds for source in index.sources()}
    true = read_segments(
        args.ground_truth,
        queries=Names(map(str, queries)),
        references=Names(sources),
        among=("the queries", f"the media in {args.index}"),
        lengths=(_seconds_of, sources.get),
    )
    keep_compiled()
    decoding = {"end_seconds": args.max_seconds, **index.segmenter.decoding}
    scores: dict[Pair, float] = {}
    predicted: list[tuple[Segment, float]] = []
    failed: dict[str, str] = {}
    for query in tqdm(queries, unit="query", disable=None):
        try:
            # Without its SHA-256: a query that is an indexed file is to be found by its content.
            check_regular(query)
            result = index.query(decode_media(query, **decoding), count=CANDIDATES)
        except (MediaError, FingerprintError, OSError) as error:
            failed[str(query)] = one_line(error)
            reason = f"{printable(str(query))}: not compared, {one_line(error)}"
            print(f"avcl-fingerprint: {reason}", file=sys.stderr)
            continue
        for match in result.matches:
            pair = (str(query), match.source)
            scores[pair] = match.score
            for i in match.intervals:
                times = (i.query_start, i.query_end, i.reference_start, i.reference_end)
                predicted.append((Segment(*pair, *times), match.score))
    pairs = {segment.pair for segment in true}
    results = {
        "queries": len(queries),
        "queries_with_ground_truth": len({query for query, _ in pairs}),
        "threshold": THRESHOLD,
        "pairs": {"count": len(pairs), **_metrics(pair_curve(scores, pairs))},
        "segments": {"count": len(true), **_metrics(segment_curve(predicted, true))},
        "failed": failed,
    }
    print(json.dumps(results, indent=1) if args.json else "\n".join(_to_lines(results)))
    return 1 if failed else 0


@functools.cache
def _seconds_of(query: str) -> float | None:
    """Returns the length that a file states; None for one that cannot be read, see `run`."""
    try:
        return probe(query).duration_seconds
    except (MediaError, OSError):
        return None


def _metrics(curve: Curve) -> dict[str, float | None]:
    precision, recall = curve.at(THRESHOLD)
    return {
        "micro_average_precision": curve.average_precision,
        f"recall_at_precision_{100 * _PRECISION:.0f}": curve.recall_at_precision(_PRECISION),
        "precision_at_threshold": precision,
        "recall_at_threshold": recall,
    }


def _to_lines(results: dict[str, Any]) -> Iterator[str]:
    yield f"{results['queries']} queries, {results['queries_with_ground_truth']} with ground truth"
    for name, what in (("pairs", "query and reference"), ("segments", "their intervals")):
        metrics = results[name]
        average, recall, precision_there, recall_there = list(metrics.values())[1:]
        there = "no precision" if precision_there is None else f"precision {precision_there:.3f}"
        yield (
            f"{metrics['count']} {name} ({what}): µAP {average:.3f}, recall {recall:.3f} at "
            f"precision {_PRECISION:g}; at the threshold {there}, recall {recall_there:.3f}"
        )
