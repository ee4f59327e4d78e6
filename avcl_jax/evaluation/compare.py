"""Table of runs of one protocol, with paired significance.

    python -m avcl_jax.evaluation.compare RUN RUN …

Each RUN is a workdir with results.json and outcomes.npz. The first is what the others are compared
with: difference, its 95 % interval by paired bootstrap over sources, and the p-value of exchanging
the two runs' outcomes source by source, corrected for the number of comparisons of a metric (Holm).
It says how sure one can be about *these trained encoders* on other videos of the kind; whether a
method is better needs several trainings of each, as `configs/ablation.py` runs them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from avcl_jax.command_line import ends_in_one_line
from avcl_jax.errors import UserError
from avcl_jax.evaluation.protocol import OUTCOMES, RESULTS, Outcomes, inputs_of, read_outcomes
from avcl_jax.evaluation.statistics import Comparison, compare, holm
from avcl_jax.page import as_text, metric_texts
from avcl_jax.paths import absolute_path

# Keys of a metric in results.json that are needed here.
_KEYS = {"value", "low", "high", "kind", "inputs", "chosen", "what", "unit", "chance"}


def read_run(workdir: epath.PathLike) -> tuple[dict[str, Any], Outcomes]:
    """Reads the results and outcomes of a protocol.

    Raises:
        UserError: if there are none, or they are damaged.
    """
    path = absolute_path(workdir) / RESULTS
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} does not contain {RESULTS}: run a protocol with it") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): run the protocol again") from error
    if "metrics" not in results:
        raise UserError(
            f"{path} is not the result of a protocol: compare sweeps by configs/ablation.py"
        )
    if any(not metric.keys() >= _KEYS for metric in results["metrics"].values()):
        raise UserError(f"{path} was written by another version of avcl-jax: run it again")
    return results, read_outcomes(path.with_name(OUTCOMES))


def compare_runs(
    runs: Sequence[tuple[Mapping[str, Any], Outcomes]],
    *,
    resamples: int,
    seed: int,
    other_data: bool,
) -> dict[str, list[Comparison]]:
    """Compares every run with the first.

    Args:
        runs: results of `read_run`, at least two.
        resamples: number of resamples of the bootstrap, and of exchanges of the test.
        other_data: compare although fingerprints of data differ; units must be the same still.

    Returns:
        For each metric that all runs have, the comparisons of the runs after the first, with
        p-values corrected for their number.

    Raises:
        UserError: if they are not of one protocol and version, or over other units or data.
    """
    (first, outcomes), *others = runs
    paired = []
    for other, found in others:
        one, two = (f"{r['protocol']} version {r['protocol_version']}" for r in (first, other))
        if one != two:
            raise UserError(f"runs of {one} and {two} have no metric in common")
        if not other_data and (roles := _differing_data(first, other)):
            one, two = (run["data"].get(roles[0], "none") for run in (first, other))
            raise UserError(
                f"runs are over other data, {roles[0]} is {one} in one and {two} in another: "
                "compare runs on the same, or set --other-data if that is what you want to compare"
            )
        if different := set(found.units) ^ set(outcomes.units):
            raise UserError(
                f"runs are over different units, {len(different)} are in one only, for instance "
                f"{min(different)}: compare runs on the same data"
            )
        place = {unit: row for row, unit in enumerate(found.units)}
        rows = np.array([place[unit] for unit in outcomes.units])
        values = {name: array[rows] for name, array in found.values.items()}
        paired.append(Outcomes(outcomes.units, outcomes.sources, values))
    compared = {}
    for name, metric in first["metrics"].items():
        if not all(name in other["metrics"] for other, _ in others):
            continue
        (ours, sources), chosen, pairs = inputs_of(metric, outcomes), metric["chosen"], []
        for found in paired:
            if chosen and (found.values[chosen] != outcomes.values[chosen]).any():
                raise UserError(
                    f"runs are over different units in {metric['what']}: compare runs on the same "
                    "data"
                )
            theirs, _ = inputs_of(metric, found)
            pairs.append(
                compare(metric["kind"], ours, theirs, sources, resamples=resamples, seed=seed)
            )
        corrected = zip(pairs, holm([pair.p_value for pair in pairs]), strict=True)
        compared[name] = [pair._replace(p_value=p) for pair, p in corrected]
    return compared


def _differing_data(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Returns the roles in which two results name other data."""
    return sorted({role for role, _ in one["data"].items() ^ two["data"].items()})


def as_table(
    names: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Sequence[Comparison]],
) -> str:
    """Returns the comparison as a table in Markdown, one row per metric and run."""
    lines = [
        "| metric | run | value | 95 % interval | difference to the first | p |",
        "|---|---|---|---|---|---|",
    ]
    for key, pairs in compared.items():
        for name, result, pair in zip(names, results, [None, *pairs], strict=True):
            metric = result["metrics"][key]
            value, low, high, _ = metric_texts(metric)
            what, difference, p = metric["what"], "", ""
            if pair is not None:
                change = [as_text(bound, metric["unit"], signed=True) for bound in pair.difference]
                what, p = "", as_text(pair.p_value, "number")
                difference = f"{change[0]} ({change[1]} … {change[2]})"
            lines.append(f"| {what} | {name} | {value} | {low} … {high} | {difference} | {p} |")
    return "\n".join(lines)


@ends_in_one_line("compare: error", failed=1)
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m avcl_jax.evaluation.compare",
        description="Table of runs of one protocol, with paired significance.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir with results.json")
    how_many = "resamples of bootstrap and test (default: as many as the first run)"
    parser.add_argument("--resamples", type=int, help=how_many)
    parser.add_argument("--seed", type=int, default=0, help="seed of bootstrap and test")
    anyway = "compare although runs are over other data"
    parser.add_argument("--other-data", action="store_true", help=anyway)
    given = parser.parse_args(arguments)
    if len(given.runs) < 2:
        raise UserError(f"compare needs at least two runs, got {given.runs[0]}")
    runs = [read_run(run) for run in given.runs]
    first, *_ = results = [of_run for of_run, _ in runs]
    resamples = given.resamples or first["config"]["bootstrap"]["resamples"]
    compared = compare_runs(runs, resamples=resamples, seed=given.seed, other_data=given.other_data)
    for name, other in zip(given.runs, results, strict=True):
        if roles := _differing_data(first, other):
            print(f"{name} is over other data than {given.runs[0]}: {', '.join(roles)}")
    print(
        f"{first['protocol']} version {first['protocol_version']}, {first['units']} units of "
        f"{first['sources']} sources, {resamples} resamples\n\n"
        f"{as_table(given.runs, results, compared)}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
