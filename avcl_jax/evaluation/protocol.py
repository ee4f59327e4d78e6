"""What a protocol is, and what it measures: outcomes by unit, and metrics that come out of them.

A unit is a video, a query, a pair of views. `outcomes.npz` keeps what each metric was computed
from, unit by unit, so that `avcl_jax.evaluation.compare` can test two runs on the same units.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from avcl_jax.errors import UserError
from avcl_jax.evaluation.page import percent
from avcl_jax.evaluation.significance import Interval, bootstrap
from avcl_jax.evaluation.written import write_bytes

RESULTS, OUTCOMES, REPORT = "results.json", "outcomes.npz", "report.html"


class ProtocolError(UserError):
    """A protocol that cannot be run as asked, or results that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which protocol this is.

    Attributes:
        name: for instance "video_retrieval".
        version: raised whenever the same encoder and data would get another figure.
        title: for people.
        definition: how the figures are made, sentence by sentence: enough to do it again.
    """

    name: str
    version: int
    title: str
    definition: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one figure comes out of the outcomes.

    Attributes:
        kind: a key of `significance.STATISTICS`.
        inputs: names of the arrays of `Outcomes.values` that it takes.
        what: for people, for instance "R@5".
        unit: "share", shown in per cent, or "number".
        chance: what an encoder that knows nothing gets, where that is known.
        headline: shown large in the report.
        chosen: name of the array, bool [units], of the units that it is about; None is all.
    """

    kind: str
    inputs: Sequence[str]
    what: str
    unit: str = "share"
    chance: float | None = None
    headline: bool = False
    chosen: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What was measured on each unit.

    Attributes:
        units: names, unique: record ids, or what else was asked.
        sources: name of the video each belongs to; units of one source are resampled together.
        values: arrays [units, …] by name.
    """

    units: Sequence[str]
    sources: Sequence[str]
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that a protocol hands over.

    Attributes:
        outcomes: by unit.
        metrics: by name; the names are the keys of results.json.
        details: further results, JSON.
        sections: HTML of the report, made by `evaluation.page`.
    """

    outcomes: Outcomes
    metrics: Mapping[str, Metric]
    details: Mapping[str, Any]
    sections: Sequence[str]


def write_outcomes(path: epath.Path, outcomes: Outcomes) -> None:
    """Writes outcomes.npz, whole or not at all.

    Raises:
        ProtocolError: if units are not unique, or arrays are of other lengths.
    """
    count = len(outcomes.units)
    if len(set(outcomes.units)) != count:
        raise ProtocolError(f"{count} units have only {len(set(outcomes.units))} names")
    lengths = {name: len(values) for name, values in outcomes.values.items()}
    lengths["sources"] = len(outcomes.sources)
    wrong = {name: length for name, length in lengths.items() if length != count}
    if wrong:
        raise ProtocolError(f"there are {count} units, but {wrong}")
    arrays: dict[str, Any] = {
        "units": np.array(outcomes.units, dtype=np.str_),
        "sources": np.array(outcomes.sources, dtype=np.str_),
    }
    arrays |= {f"value_{name}": values for name, values in outcomes.values.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_outcomes(path: epath.PathLike) -> Outcomes:
    """Reads what `write_outcomes` wrote.

    Raises:
        ProtocolError: if it is missing or damaged.
    """
    path = epath.Path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            values = {
                name.removeprefix("value_"): arrays[name]
                for name in arrays.files
                if name.startswith("value_")
            }
            return Outcomes(arrays["units"].tolist(), arrays["sources"].tolist(), values)
    except FileNotFoundError:
        raise ProtocolError(f"{path} is missing: run the protocol again") from None
    except (ValueError, KeyError, OSError) as error:
        raise ProtocolError(f"{path} is damaged ({error}): run the protocol again") from error


def inputs_of(
    figure: Metric | Mapping[str, Any], outcomes: Outcomes
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the arrays that a metric takes, and the sources of its units.

    Args:
        figure: a metric, or what results.json says of it.
        outcomes: of the run.

    Raises:
        ProtocolError: if nothing measured one of the arrays.
    """
    kept = dataclasses.asdict(figure) if isinstance(figure, Metric) else figure
    names = [*kept["inputs"], *([] if kept["chosen"] is None else [kept["chosen"]])]
    if missing := [name for name in names if name not in outcomes.values]:
        raise ProtocolError(
            f"{kept['what']} needs the outcomes {', '.join(missing)}, which nothing measured"
        )
    arrays = [np.asarray(outcomes.values[name]) for name in kept["inputs"]]
    sources = np.array(outcomes.sources)
    if kept["chosen"] is None:
        return arrays, sources
    chosen = np.asarray(outcomes.values[kept["chosen"]], bool)
    return [array[chosen] for array in arrays], sources[chosen]


def estimate(measured: Measured, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Returns what results.json says of every metric: value, interval, and how to get them.

    Args:
        measured: by the protocol.
        resamples: of the bootstrap over sources.
        seed: of its draws.

    Raises:
        ProtocolError: if a metric needs outcomes that nothing measured.
    """
    figures = {}
    for name, metric in measured.metrics.items():
        inputs, sources = inputs_of(metric, measured.outcomes)
        interval = (
            bootstrap(metric.kind, inputs, sources, resamples=resamples, seed=seed)
            if len(sources)
            else Interval(np.nan, np.nan, np.nan)  # no unit is chosen for it
        )
        figures[name] = {key: _finite(value) for key, value in interval._asdict().items()} | {
            "chance": None if metric.chance is None else _finite(metric.chance),
            "kind": metric.kind,
            "inputs": list(metric.inputs),
            "chosen": metric.chosen,
            "what": metric.what,
            "unit": metric.unit,
        }
    return figures


def _finite(value: float) -> float | None:
    """Returns None for what is not defined: JSON has no other word for it."""
    return value if np.isfinite(value) else None


def in_unit(value: float | None, unit: str) -> str:
    """Returns a figure as people read it: a share in per cent, a dash where it is not defined."""
    if value is None:
        return "–"
    return percent(value, 1).replace("\u00a0", " ") if unit == "share" else f"{value:.3g}"
