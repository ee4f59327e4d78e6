"""What every protocol leaves behind: results.json, outcomes.npz and report.html.

- results.json: protocol and its version, config, fingerprints of encoder and data, versions of the
  libraries, and each metric with its bootstrap interval over sources;
- outcomes.npz: what each metric was computed from, unit by unit (a unit is a video, a query, a
  pair of views), so that `avcl_jax.evaluation.compare` can test two runs on the same units;
- report.html: the same for people, with what the protocol adds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.page import definitions, page, percent, section, table, text, tiles
from avcl_jax.evaluation.significance import bootstrap
from avcl_jax.evaluation.written import Stages, print_paths, versions, write_bytes, write_text
from avcl_jax.training.metric_writer import peak_memory_gb

RESULTS, OUTCOMES, REPORT = "results.json", "outcomes.npz", "report.html"


class ProtocolError(ValueError):
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
    """

    kind: str
    inputs: Sequence[str]
    what: str
    unit: str = "share"
    chance: float | None = None
    headline: bool = False


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


def run_fingerprint(
    config: ml_collections.ConfigDict,
    protocol: Protocol,
    *,
    encoder: EncoderSource | None,
    data: Mapping[str, str],
) -> str:
    """Returns a digest of everything that decides the figures.

    Args:
        config: of the run; where it executes is left out.
        protocol: which.
        encoder: what is evaluated; None where there is none (baselines).
        data: fingerprints of the data sets by their role.
    """
    settings = experiment.flatten(config.to_dict())
    kept = {k: v for k, v in settings.items() if k not in experiment.EXECUTION_KEYS}
    kept.pop("encoder", None)  # its fingerprint counts, not its place
    parts = [protocol.name, protocol.version, kept, dict(data)]
    parts.append(None if encoder is None else encoder.fingerprint)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def finished(
    workdir: epath.PathLike, protocol: Protocol, fingerprint: str
) -> dict[str, Any] | None:
    """Returns the results in `workdir` if they are those of `fingerprint`, and says so.

    Raises:
        ProtocolError: if the directory holds something else that this run would overwrite.
    """
    workdir = epath.Path(workdir)
    path = workdir / RESULTS
    if (workdir / "checkpoints").exists() and not path.exists():
        raise ProtocolError(f"{workdir} is the workdir of a training run: choose another --workdir")
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if results.get("protocol") != protocol.name:
        raise ProtocolError(
            f"{workdir} holds the results of {results.get('protocol', 'configs/evaluate.py')}: "
            "choose another --workdir"
        )
    if results["fingerprint"] != fingerprint:
        raise ProtocolError(
            f"{workdir} holds results of this protocol with another encoder, other data or other "
            "settings: choose another --workdir, or delete them"
        )
    if not all((workdir / name).exists() for name in (OUTCOMES, REPORT)):
        return None
    print(f"{workdir} already holds these results")
    print_paths(workdir)
    return results


def write_results(
    workdir: epath.PathLike,
    config: ml_collections.ConfigDict,
    protocol: Protocol,
    measured: Measured,
    *,
    encoder: EncoderSource | None,
    data: Mapping[str, str],
    stages: Stages,
) -> dict[str, Any]:
    """Writes what a protocol measured, prints its figures, and returns results.json.

    Args:
        workdir: made if needed.
        config: of the run; `config.bootstrap.resamples` and `config.seed` are read.
        protocol: which.
        measured: by it.
        encoder: what was evaluated; None where there is none.
        data: fingerprints of the data sets by their role, as RecordDataset gives them.
        stages: times.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    figures = _estimate(measured, resamples=config.bootstrap.resamples, seed=config.seed)
    results = {
        "protocol": protocol.name,
        "protocol_version": protocol.version,
        "metrics": figures,
        "details": dict(measured.details),
        "units": len(measured.outcomes.units),
        "sources": len(set(measured.outcomes.sources)),
        "encoder": None
        if encoder is None
        else {"path": encoder.path, "fingerprint": encoder.fingerprint, "step": encoder.step},
        "data": dict(data),
        "fingerprint": run_fingerprint(config, protocol, encoder=encoder, data=data),
        "seed": config.seed,
        "seconds": round(stages.total, 1),
        "stages": stages.seconds,
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "versions": versions(),
        "config": json.loads(experiment.to_json(config)),
    }
    write_outcomes(workdir / OUTCOMES, measured.outcomes)
    write_text(workdir / REPORT, _report(protocol, measured, results))
    write_text(workdir / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n")
    for name, figure in figures.items():
        print(f"{measured.metrics[name].what:40s} {_written(figure)}")
    print_paths(workdir)
    return results


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


def _estimate(measured: Measured, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    figures = {}
    for name, metric in measured.metrics.items():
        missing = [key for key in metric.inputs if key not in measured.outcomes.values]
        if missing:
            raise ProtocolError(f"{name} needs the outcomes {missing}, which nothing measured")
        inputs = [np.asarray(measured.outcomes.values[key]) for key in metric.inputs]
        interval = bootstrap(
            metric.kind,
            inputs,
            np.array(measured.outcomes.sources),
            resamples=resamples,
            seed=seed,
        )
        figures[name] = interval._asdict() | {
            "chance": metric.chance,
            "kind": metric.kind,
            "inputs": list(metric.inputs),
            "what": metric.what,
            "unit": metric.unit,
        }
    return figures


def _written(figure: Mapping[str, Any]) -> str:
    value, low, high = (in_unit(figure[key], figure["unit"]) for key in ("value", "low", "high"))
    chance = (
        "" if figure["chance"] is None else f", chance {in_unit(figure['chance'], figure['unit'])}"
    )
    return f"{value} (95 %: {low} to {high}{chance})"


def in_unit(value: float, unit: str) -> str:
    """Returns a figure as people read it: a share in per cent."""
    return percent(value, 1).replace("\u00a0", " ") if unit == "share" else f"{value:.3g}"


def _report(protocol: Protocol, measured: Measured, results: Mapping[str, Any]) -> str:
    figures = results["metrics"]
    shown = [
        (in_unit(figures[n]["value"], m.unit), m.what)
        for n, m in measured.metrics.items()
        if m.headline
    ]
    rows = [
        [
            figure["what"],
            in_unit(figure["value"], figure["unit"]),
            f"{in_unit(figure['low'], figure['unit'])} … {in_unit(figure['high'], figure['unit'])}",
            "–" if figure["chance"] is None else in_unit(figure["chance"], figure["unit"]),
        ]
        for figure in figures.values()
    ]
    about = {
        "protocol": f"{protocol.name}, version {protocol.version}",
        "encoder": "–" if results["encoder"] is None else results["encoder"]["path"],
        "encoder fingerprint": "–"
        if results["encoder"] is None
        else results["encoder"]["fingerprint"],
        **{f"data: {role}": value for role, value in results["data"].items()},
        "units": f"{results['units']} of {results['sources']} sources",
        "seed": results["seed"],
        "took": f"{results['seconds']} s",
    }
    steps = "".join(f"<li>{text(sentence)}</li>" for sentence in protocol.definition)
    resamples = results["config"]["bootstrap"]["resamples"]
    parts = [
        f"<h1>{text(protocol.title)}</h1>",
        tiles(shown),
        section(
            "Figures",
            f"With 95 % intervals from {resamples} bootstrap resamples of the sources: how far the "
            "figure would move with other videos of this kind, not with another training.",
            table(["", "figure", "interval", "chance"], rows),
        ),
        *measured.sections,
        section(
            "What was run",
            "Everything needed to run it again.",
            definitions(about),
            f"<details open><summary>Protocol</summary><ul>{steps}</ul></details>",
            "<details><summary>Configuration</summary>"
            f"<pre>{text(json.dumps(results['config'], indent=2))}</pre></details>",
            "<details><summary>Versions</summary>"
            f"<pre>{text(json.dumps(results['versions'], indent=2))}</pre></details>",
        ),
    ]
    return page(title=protocol.title, body="".join(parts))
