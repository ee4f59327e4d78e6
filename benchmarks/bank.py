"""Time and memory of ranking a million rows of the feature bank on a CPU.

    python -m benchmarks.bank --json F

The baseline is FAISS's exact index, `IndexFlatIP`, by default and tuned. Each measurement has its
own process, and the sides take turns. docs/performance.md has the rows.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import measure
from benchmarks.measure import Measured, RowTable, Target
from benchmarks.train_step import ALLOCATOR

ROWS, DIM, ANCHORS = 2**20, 128, 256
# FAISS compares row by row for fewer queries than this. Its default is so large that it nearly
# always does, and is six times slower here.
_FAISS_TUNED_THRESHOLD = 20


def rows_and_queries(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float32 [ROWS, DIM], and anchors near some of them [ANCHORS, DIM]."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = rng.choice(ROWS, ANCHORS, replace=False)
    queries = rows[near] + 0.1 * rng.standard_normal((ANCHORS, DIM), dtype=np.float32)
    return rows, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def _time_search(search: Callable[[], tuple[Any, Any]], searches: int, results: str) -> float:
    """Median seconds of a search after a warm-up; saves scores and rows."""
    scores, rows = search()
    np.savez(results, scores=scores, rows=rows)
    return statistics.median(measure.seconds_of_each(search, searches, warmup=0))


def seconds_of_ours(*, ranks: int, searches: int, results: str) -> float:
    """Seconds of `bank_ranking.rank`."""
    import jax
    import jax.numpy as jnp

    from avcl_jax.objectives import bank_ranking
    from avcl_jax.objectives.bank_rows import BankRows, RowNumbers

    rows, queries = rows_and_queries()
    source = np.arange(ROWS, dtype=np.int32)

    @jax.jit
    def rank(queries: Any, rows: Any, source: Any, usable: Any) -> tuple[Any, Any]:
        # No row has the source of an anchor: the neighbours are those of FAISS.
        own, present = jnp.full(ANCHORS, -1), jnp.ones(ANCHORS, bool)
        anchors = bank_ranking.Anchors([queries], own, present)
        numbers = RowNumbers(jnp.repeat(source[:, None], 4, axis=1))
        bank = BankRows({"video": rows}, None, numbers)
        return bank_ranking.rank(anchors, bank, usable, ranks, pairs=[("video", "video")], means=[])

    arguments = jax.device_put((queries, rows, source, np.ones(ROWS, bool)))
    return _time_search(lambda: jax.block_until_ready(rank(*arguments)), searches, results)


def seconds_of_faiss(*, ranks: int, searches: int, results: str, tuned: bool) -> float:
    """Seconds of `IndexFlatIP.search`."""
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    if tuned:
        faiss.cvar.distance_compute_blas_threshold = _FAISS_TUNED_THRESHOLD
    rows, queries = rows_and_queries()
    index = faiss.IndexFlatIP(DIM)
    index.add(rows)
    return _time_search(lambda: index.search(queries, ranks), searches, results)


def differing_neighbours(one: str, other: str) -> int:
    """Number of neighbours in the first file alone, beyond exchanges that rounding explains."""
    with np.load(one) as first, np.load(other) as second:
        assert np.abs(first["scores"] - second["scores"]).max() < 1e-5
        count = 0
        for mine, theirs, scores in zip(
            first["rows"], second["rows"], first["scores"], strict=True
        ):
            only = ~np.isin(mine, theirs)
            count += int((only & (scores > scores[-1] + 1e-5)).sum())
    return count


def over_faiss(ranks: int, repeats: int) -> Measured:
    """Our searches per second over those of FAISS by default; the tuned one is in the detail."""
    measure.need("faiss")
    with tempfile.TemporaryDirectory() as directory:

        def seconds_of(name: str, function: str, **arguments: bool) -> float:
            results = f"{directory}/{name}.npz"
            return measure.run_child(
                f"benchmarks.bank:{function}",
                {"ranks": ranks, "searches": 3, "results": results, **arguments},
            )

        sides = {
            "ours": functools.partial(seconds_of, "ours", "seconds_of_ours"),
            "faiss": functools.partial(seconds_of, "faiss", "seconds_of_faiss", tuned=False),
            "faiss_tuned": functools.partial(
                seconds_of, "faiss_tuned", "seconds_of_faiss", tuned=True
            ),
        }
        seconds = measure.interleave(sides, repeats=repeats)
        differing = {
            name: differing_neighbours(f"{directory}/ours.npz", f"{directory}/{name}.npz")
            for name in ("faiss", "faiss_tuned")
        }
    if any(differing.values()):
        raise RuntimeError(f"neighbours differ from those of FAISS: {differing}")
    value, detail = measure.ratio(seconds, "faiss", "ours", quantity="seconds")
    over_tuned, _ = measure.ratio(seconds, "faiss_tuned", "ours", quantity="seconds")
    return value, {"rows": ROWS, "anchors": ANCHORS, "over_faiss_tuned": over_tuned, **detail}


def memory_of_sampling() -> dict[str, int]:
    """Bytes that the draws for all terms of a step take in addition to a float32 bank of ROWS rows.

    Returns:
        `grown`, the growth of the process during the draws; `drawn`, the part of it that is
        returned; `temporary`, the rest according to the compiler.
    """
    import jax
    import jax.numpy as jnp

    from avcl_jax.configs import pretrain
    from avcl_jax.objectives import feature_bank
    from avcl_jax.training import program
    from benchmarks.batches import complete_views, draw_all

    config = pretrain.get_config("kinetics400")
    config.bank.size = ROWS
    spec = program.loss_spec(config)
    assert spec.bank is not None
    options = {"playbacks": spec.bank.playbacks, "labels": 1}
    rows, queries = rows_and_queries()
    by_video: Any = {"video": rows.reshape(-1, 2, DIM), "audio": rows[::-1].reshape(-1, 2, DIM)}
    empty = feature_bank.create(ROWS, DIM, jnp.float32, labels=1)
    bank = feature_bank.insert(empty, complete_views(by_video, np.arange(ROWS // 2), **options))
    del rows, by_video, empty
    embeddings = jnp.asarray(queries).reshape(-1, 2, DIM)
    anchors = complete_views(
        dict.fromkeys(("video", "audio"), embeddings), -1 - np.arange(len(embeddings)), **options
    )

    def draw(bank: Any, views: Any, key: Any) -> list[Any]:
        return draw_all(bank, key, views, spec)

    arguments = (bank, anchors, jax.random.key(0))
    compiled = jax.jit(draw).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    jax.block_until_ready(bank)
    return {
        "grown": measure.peak_growth_bytes(lambda: jax.block_until_ready(compiled(*arguments))),
        "drawn": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def extra_mb(repeats: int) -> Measured:
    """Megabytes that the draws take in addition to the bank and the rows that they return."""
    # Without the allocator that keeps freed memory, which would hide new allocations.
    default = {"GLIBC_TUNABLES": ""}
    results = [
        measure.run_child("benchmarks.bank:memory_of_sampling", {}, environment=default)
        for _ in range(repeats)
    ]
    extra = [(memory["grown"] - memory["drawn"]) / 1e6 for memory in results]
    return statistics.median(extra), {
        "extra_mb": measure.spread(extra),
        "drawn_mb": results[0]["drawn"] / 1e6,
        "temporary_mb_by_the_compiler": results[0]["temporary"] / 1e6,
    }


_ROWS: RowTable[int] = {
    "bank_over_faiss_k64": ("ratio", Target(">=", 2), functools.partial(over_faiss, 64)),
    "bank_over_faiss_k1024": ("ratio", Target(">=", 1.5), functools.partial(over_faiss, 1024)),
    "bank_1m_extra_mb": ("MB", Target("<=", 256), extra_mb),
}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = measure.command_parser("bank", __doc__, rows=_ROWS, repeats=True)
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    measure.measure_rows(_ROWS, args.rows, args.repeats, args.json)


if __name__ == "__main__":
    measure.run_command(main)
