"""Protocols and their results: outcomes by unit, and metrics of these outcomes.

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
from avcl_jax.evaluation.statistics import STATISTICS, Interval, bootstrap
from avcl_jax.paths import write_bytes

RESULTS, OUTCOMES, REPORT = "results.json", "outcomes.npz", "report.html"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Identity and definition of a protocol.

    `version` is raised whenever the same encoder and data would get other metrics. The sentences of
    `definition` define the metrics, enough to compute them again.
    """

    name: str
    version: int
    title: str
    definition: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Metric:
    """Statistic `kind`, a key of `STATISTICS`, of the outcomes named in `inputs`.

    Attributes:
        what: title, such as "R@5".
        unit: "share", shown in %, or "number".
        chance: value of an encoder that knows nothing, if known.
        headline: shown large in the report.
        chosen: name of the outcomes, bool [units], of the units that it is about; None is all.
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
    """Measured values of every unit: arrays [units, …] by name.

    Units have unique names: record ids, or names of queries. Those of one source, the video that
    they belong to, are resampled together.
    """

    units: Sequence[str]
    sources: Sequence[str]
    values: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of a protocol.

    Attributes:
        metrics: metrics by their names in results.json.
        details: further results, JSON.
        sections: HTML sections of the report, made by `avcl_jax.page`.
        view: further keys of results.json, next to those of every protocol.
        title: title of the report; that of the protocol if empty.
        lead: first paragraph of the report, HTML.
        about: further facts about the run, for the report.
    """

    outcomes: Outcomes
    metrics: Mapping[str, Metric]
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sections: Sequence[str] = ()
    view: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    title: str = ""
    lead: str = ""
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)


def write_outcomes(path: epath.Path, outcomes: Outcomes) -> None:
    """Writes outcomes.npz, whole or not at all.

    Raises:
        UserError: if units are not unique, or arrays are of other lengths.
    """
    arrays: dict[str, Any] = {f"value_{name}": a for name, a in outcomes.values.items()}
    arrays |= {n: np.array(getattr(outcomes, n), np.str_) for n in ("units", "sources")}
    count, names = len(outcomes.units), len(set(outcomes.units))
    if names != count:
        raise UserError(f"{count} units have only {names} names")
    if wrong := {
        n.partition("value_")[2] or n: len(a) for n, a in arrays.items() if len(a) != count
    }:
        raise UserError(f"there are {count} units, but {wrong}")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_outcomes(path: epath.PathLike) -> Outcomes:
    """Reads what `write_outcomes` wrote.

    Raises:
        UserError: if it is missing or damaged.
    """
    path = epath.Path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            units, sources = arrays["units"].tolist(), arrays["sources"].tolist()
            names = [name.partition("value_")[2] for name in arrays.files]
            return Outcomes(units, sources, {n: arrays[f"value_{n}"] for n in names if n})
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run the protocol again") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): run the protocol again") from error


def inputs_of(
    metric: Metric | Mapping[str, Any], outcomes: Outcomes
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the arrays that a metric, or its entry in results.json, takes, and their sources.

    Raises:
        UserError: if nothing measured one of the arrays.
    """
    fields = vars(metric) if isinstance(metric, Metric) else metric
    mask, values = fields["chosen"], outcomes.values
    names = [*fields["inputs"], *([mask] if mask else [])]
    if missing := ", ".join(name for name in names if name not in values):
        raise UserError(f"{fields['what']} needs the outcomes {missing}, which nothing measured")
    rows = np.flatnonzero(values[mask]) if mask else slice(None)
    arrays = [np.asarray(values[name])[rows] for name in fields["inputs"]]
    return arrays, np.array(outcomes.sources)[rows]


def merge(
    units: Sequence[str], sources: Sequence[str], parts: Mapping[str, Measured]
) -> tuple[Outcomes, dict[str, Metric]]:
    """Merges results whose units are some of `units`, each; their metrics stay metrics of those.

    Args:
        parts: results by the name of the mask of their units, "" for results of all units.
    """
    place = {unit: number for number, unit in enumerate(units)}
    values: dict[str, np.ndarray] = {}
    metrics: dict[str, Metric] = {}
    for mask, part in parts.items():
        rows = [place[unit] for unit in part.outcomes.units]
        marked = {mask: np.ones(len(rows), bool)} if mask and part.metrics else {}
        for name, array in (marked | dict(part.outcomes.values)).items():
            values[name] = np.zeros((len(units), *array.shape[1:]), array.dtype)
            values[name][rows] = array
        for name, metric in part.metrics.items():
            metrics[name] = dataclasses.replace(metric, chosen=mask or None)
    return Outcomes(units, sources, values), metrics


def point_values(measured: Measured) -> dict[str, float | None]:
    """Returns the value of every metric, without an interval; None where it is not defined."""
    return {
        name: finite(STATISTICS[metric.kind](*inputs_of(metric, measured.outcomes)[0]))
        for name, metric in measured.metrics.items()
    }


def estimate(measured: Measured, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Returns the entry of every metric in results.json: value, interval, and how to get them."""
    metrics = {}
    for name, metric in measured.metrics.items():
        inputs, sources = inputs_of(metric, measured.outcomes)
        interval = Interval(np.nan, np.nan, np.nan)
        if len(sources):  # else no unit is chosen for it
            interval = bootstrap(metric.kind, inputs, sources, resamples=resamples, seed=seed)
        numbers = interval._asdict() | {"chance": metric.chance}
        entry = {key: getattr(metric, key) for key in ("kind", "chosen", "what", "unit")}
        entry |= {"inputs": list(metric.inputs)}
        metrics[name] = {key: finite(value) for key, value in numbers.items()} | entry
    return metrics


def finite(value: float | None) -> float | None:
    """Maps NaN and infinity to None: JSON has neither."""
    return value if value is not None and np.isfinite(value) else None
