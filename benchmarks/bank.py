"""Time and memory of ranking a million rows of the feature bank on a CPU.

    python -m benchmarks.bank --json F

The baseline is FAISS's exact index, `IndexFlatIP`, by default and tuned. Every measurement is a
process of its own, and the sides take turns. Rows are described in docs/performance.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measure import (
    REPEATS,
    Target,
    interleave,
    measure_rows,
    median_ratio,
    need,
    peak_growth_bytes,
    run_child,
    run_command,
    spread,
    writable_path,
)
from benchmarks.train_step import ALLOCATOR

ROWS, DIM, ANCHORS = 2**20, 128, 256
# Below this many queries FAISS compares row by row; its default is so large that it nearly always
# does, which is six times slower here.
_FAISS_TUNED_THRESHOLD = 20


def rows_and_queries(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float32 [ROWS, DIM], and anchors near some of them [ANCHORS, DIM]."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((ROWS, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = rng.choice(ROWS, ANCHORS, replace=False)
    queries = rows[near] + 0.1 * rng.standard_normal((ANCHORS, DIM), dtype=np.float32)
    return rows, queries / np.linalg.norm(queries, axis=1, keepdims=True)


def _timed(search: Callable[[], tuple[Any, Any]], searches: int, results: str) -> float:
    """Median seconds of a search after one uncounted; keeps what it found."""
    seconds = []
    for _ in range(1 + searches):
        begin = time.perf_counter()
        scores, rows = search()
        seconds.append(time.perf_counter() - begin)
    np.savez(results, scores=scores, rows=rows)
    return statistics.median(seconds[1:])


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
        # No row is of an anchor's own source: the same neighbours as FAISS finds.
        own, present = jnp.full(ANCHORS, -1), jnp.ones(ANCHORS, bool)
        anchors = bank_ranking.Anchors([queries], own, present)
        numbers = RowNumbers(jnp.repeat(source[:, None], 4, axis=1))
        bank = BankRows({"video": rows}, None, numbers)
        return bank_ranking.rank(anchors, bank, usable, ranks, pairs=[("video", "video")], means=[])

    arguments = jax.device_put((queries, rows, source, np.ones(ROWS, bool)))
    return _timed(lambda: jax.block_until_ready(rank(*arguments)), searches, results)


def seconds_of_faiss(*, ranks: int, searches: int, results: str, tuned: bool) -> float:
    """Seconds of `IndexFlatIP.search`."""
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    if tuned:
        faiss.cvar.distance_compute_blas_threshold = _FAISS_TUNED_THRESHOLD
    rows, queries = rows_and_queries()
    index = faiss.IndexFlatIP(DIM)
    index.add(rows)
    return _timed(lambda: index.search(queries, ranks), searches, results)


def differing_neighbours(one: str, other: str) -> int:
    """How many neighbours one has and the other has not, beyond what rounding can exchange."""
    with np.load(one) as first, np.load(other) as second:
        assert np.abs(first["scores"] - second["scores"]).max() < 1e-5
        count = 0
        for mine, theirs, scores in zip(
            first["rows"], second["rows"], first["scores"], strict=True
        ):
            only = ~np.isin(mine, theirs)
            count += int((only & (scores > scores[-1] + 1e-5)).sum())
    return count


def over_faiss(ranks: int, repeats: int) -> tuple[float, dict[str, Any]]:
    """Our searches a second over FAISS's as it comes; over the tuned one in the detail."""
    need("faiss")
    with tempfile.TemporaryDirectory() as directory:
        sides = {
            "ours": ("seconds_of_ours", {}),
            "faiss": ("seconds_of_faiss", {"tuned": False}),
            "faiss_tuned": ("seconds_of_faiss", {"tuned": True}),
        }

        def measure(name: str) -> float:
            function, arguments = sides[name]
            return run_child(
                f"benchmarks.bank:{function}",
                {
                    "ranks": ranks,
                    "searches": 3,
                    "results": f"{directory}/{name}.npz",
                    **arguments,
                },
            )

        seconds = interleave(
            {name: functools.partial(measure, name) for name in sides}, repeats=repeats
        )
        differing = {
            name: differing_neighbours(f"{directory}/ours.npz", f"{directory}/{name}.npz")
            for name in ("faiss", "faiss_tuned")
        }
    if any(differing.values()):
        raise RuntimeError(f"neighbours differ from those of FAISS: {differing}")
    return median_ratio(seconds["faiss"], seconds["ours"]), {
        "rows": ROWS,
        "anchors": ANCHORS,
        "over_faiss_tuned": median_ratio(seconds["faiss_tuned"], seconds["ours"]),
        **{f"seconds_{name}": spread(values) for name, values in seconds.items()},
    }


def memory_of_sampling() -> dict[str, int]:
    """Bytes that drawing for all terms of a step takes beside a float32 bank of ROWS rows.

    Returns:
        `grown`, by how much the process grew while it drew; `drawn`, what of it are the rows that
        are returned; `temporary`, what the compiler says of the rest.
    """
    import jax
    import jax.numpy as jnp

    from avcl_jax.objectives import feature_bank
    from avcl_jax.training import loop
    from benchmarks.batches import complete_views, draw_all
    from configs import pretrain

    config = pretrain.get_config("kinetics400")
    config.bank.size = ROWS
    spec = loop.loss_spec(config)
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
        "grown": peak_growth_bytes(lambda: jax.block_until_ready(compiled(*arguments))),
        "drawn": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


def extra_mb(repeats: int) -> tuple[float, dict[str, Any]]:
    """Megabytes that drawing takes beside the bank and the rows that it returns."""
    # Without the allocator that keeps what was freed: it would hide what is taken anew.
    default = {"GLIBC_TUNABLES": ""}
    found = [
        run_child("benchmarks.bank:memory_of_sampling", {}, environment=default)
        for _ in range(repeats)
    ]
    extra = [(memory["grown"] - memory["drawn"]) / 1e6 for memory in found]
    return statistics.median(extra), {
        "extra_mb": spread(extra),
        "drawn_mb": found[0]["drawn"] / 1e6,
        "temporary_mb_by_the_compiler": found[0]["temporary"] / 1e6,
    }


_ROWS: dict[str, tuple[str, Target, Callable[[int], tuple[float, dict[str, Any]]]]] = {
    "bank_over_faiss_k64": ("ratio", Target(">=", 2), functools.partial(over_faiss, 64)),
    "bank_over_faiss_k1024": ("ratio", Target(">=", 1.5), functools.partial(over_faiss, 1024)),
    "bank_1m_extra_mb": ("MB", Target("<=", 256), extra_mb),
}


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bank", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=writable_path, required=True, help="where to write the rows")
    parser.add_argument("--rows", nargs="+", choices=_ROWS, default=list(_ROWS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of every measurement")
    args = parser.parse_args(arguments)
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    measure_rows(_ROWS, args.rows, args.repeats, args.json)
    return 0


if __name__ == "__main__":
    run_command(main)
