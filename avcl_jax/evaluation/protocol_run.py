"""One run of a protocol: what decides its figures, whether they are there, and how it is written.

Every protocol leaves behind, in its workdir:

- results.json: protocol and its version, config, fingerprints of encoder and data, versions of the
  libraries, and each metric with its bootstrap interval over sources;
- outcomes.npz: what the metrics were computed from (`evaluation.protocol`);
- report.html: the same for people, with what the protocol adds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from avcl_jax import experiment
from avcl_jax.encoder_source import EncoderSource
from avcl_jax.evaluation.page import definitions, page, section, table, text, tiles
from avcl_jax.evaluation.protocol import (
    OUTCOMES,
    REPORT,
    RESULTS,
    Measured,
    Protocol,
    ProtocolError,
    estimate,
    in_unit,
    write_outcomes,
)
from avcl_jax.evaluation.written import Stages, print_paths, versions, write_text
from avcl_jax.training.metric_writer import peak_memory_gb


@dataclasses.dataclass(frozen=True)
class ProtocolRun:
    """What is measured, with what, and where it is written.

    Attributes:
        protocol: which.
        config: of the run; `bootstrap.resamples` and `seed` are read here.
        workdir: of the results, local or gs://; made if needed.
        encoder: what is evaluated; None where there is none (baselines).
        data: fingerprints of the data sets by their role, as RecordDataset gives them.
        heads: digest of the heads that are measured with the encoder; None without heads.
        in_training: `workdir` is that of the pretraining run which is evaluated, and results of an
            earlier state of it are replaced. Any other protocol keeps away from such a directory,
            and results with other settings are never overwritten.
    """

    protocol: Protocol
    config: ml_collections.ConfigDict
    workdir: epath.Path
    encoder: EncoderSource | None
    data: Mapping[str, str]
    heads: str | None = None
    in_training: bool = False

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the figures; where it is executed does not."""
        settings = experiment.flatten(self.config.to_dict())
        kept = {k: v for k, v in settings.items() if k not in experiment.EXECUTION_KEYS}
        parts = [self.protocol.name, self.protocol.version, kept, dict(self.data)]
        parts.append(None if self.encoder is None else self.encoder.fingerprint)
        parts.append(self.heads)
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()

    @property
    def features(self) -> epath.Path:
        """Directory for parts of long computations; another version of the protocol has another."""
        return self.workdir / "features" / f"{self.protocol.name}-{self.protocol.version}"

    def finished(self) -> dict[str, Any] | None:
        """Returns the results in `workdir` if they are those of this run, and says so.

        Otherwise checks that the directory can be written to, before anything is computed.

        Raises:
            ProtocolError: if the directory contains something else that this run would overwrite,
                or cannot be written to.
        """
        results = self._results()
        if results is None and jax.process_index() == 0:
            try:
                new = not self.workdir.exists()
                self.workdir.mkdir(parents=True, exist_ok=True)
                trial = self.workdir / "results.json.trial"
                trial.write_text("")
                trial.unlink()
                if new:  # a run that is refused later leaves nothing behind
                    self.workdir.rmdir()
            except OSError as error:
                raise ProtocolError(
                    f"{self.workdir} cannot be written to ({error}): choose another --workdir"
                ) from error
        return results

    def _results(self) -> dict[str, Any] | None:
        path = self.workdir / RESULTS
        if (self.workdir / "checkpoints").exists() and not (self.in_training or path.exists()):
            raise ProtocolError(
                f"{self.workdir} is the workdir of a training run: choose another --workdir"
            )
        if not path.exists():
            return None
        results = json.loads(path.read_text())
        if results.get("protocol") != self.protocol.name:
            raise ProtocolError(
                f"{self.workdir} holds the results of "
                f"{results.get('protocol', 'another program')}: choose another --workdir"
            )
        if results["fingerprint"] != self.fingerprint:
            if self.in_training:
                return None
            raise ProtocolError(
                f"{self.workdir} holds results of this protocol with another encoder, other data, "
                "other settings or another version of it: choose another --workdir, or delete them"
            )
        if not all((self.workdir / name).exists() for name in (OUTCOMES, REPORT)):
            return None
        print(f"{self.workdir} already holds these results")
        print_paths(self.workdir)
        return results

    def write(
        self,
        measured: Measured,
        stages: Stages,
        *,
        report: Callable[[Mapping[str, Any]], str] | None = None,
        sections: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes what was measured, prints its figures, and returns results.json.

        Args:
            measured: by the protocol.
            stages: times.
            report: makes the page from results.json; None is the page that protocols share.
            sections: keys of results.json beside, or instead of, those of every protocol.

        Raises:
            ProtocolError: if metrics and outcomes do not fit; nothing is then written.
        """
        config = self.config
        figures = estimate(measured, resamples=config.bootstrap.resamples, seed=config.seed)
        results = {
            "protocol": self.protocol.name,
            "protocol_version": self.protocol.version,
            "metrics": figures,
            "details": dict(measured.details),
            "units": len(measured.outcomes.units),
            "sources": len(set(measured.outcomes.sources)),
            "encoder": None
            if self.encoder is None
            else {
                "path": self.encoder.path,
                "fingerprint": self.encoder.fingerprint,
                "step": self.encoder.step,
                "heads": self.heads,
            },
            "data": dict(self.data),
            "fingerprint": self.fingerprint,
            "seed": config.seed,
            "seconds": round(stages.total, 1),
            "stages": stages.seconds,
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "versions": versions(),
            "config": json.loads(experiment.to_json(config)),
            **(sections or {}),
        }
        shown = _report(self.protocol, measured, results) if report is None else report(results)
        written = json.dumps(results, indent=2, allow_nan=False)  # may raise: before any file
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_outcomes(self.workdir / OUTCOMES, measured.outcomes)
        write_text(self.workdir / REPORT, shown)
        write_text(self.workdir / RESULTS, written + "\n")
        for figure in figures.values():
            print(f"{figure['what']:40s} {_written(figure)}")
        print_paths(self.workdir)
        return results


def _written(figure: Mapping[str, Any]) -> str:
    value, low, high = (in_unit(figure[key], figure["unit"]) for key in ("value", "low", "high"))
    chance = (
        "" if figure["chance"] is None else f", chance {in_unit(figure['chance'], figure['unit'])}"
    )
    return f"{value} (95 %: {low} to {high}{chance})"


def figures_section(results: Mapping[str, Any]) -> str:
    """Returns the section of a page with every metric of results.json and its interval."""
    rows = [
        [
            figure["what"],
            in_unit(figure["value"], figure["unit"]),
            f"{in_unit(figure['low'], figure['unit'])} … {in_unit(figure['high'], figure['unit'])}",
            in_unit(figure["chance"], figure["unit"]),
        ]
        for figure in results["metrics"].values()
    ]
    return section(
        "Figures",
        f"With 95 % intervals from {results['config']['bootstrap']['resamples']} bootstrap "
        "resamples of the sources: how far the figure would move with other videos of this kind, "
        "not with another training.",
        table(["", "figure", "interval", "chance"], rows),
    )


def _report(protocol: Protocol, measured: Measured, results: Mapping[str, Any]) -> str:
    figures = results["metrics"]
    shown = [
        (in_unit(figures[n]["value"], m.unit), m.what)
        for n, m in measured.metrics.items()
        if m.headline
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
    parts = [
        f"<h1>{text(protocol.title)}</h1>",
        tiles(shown),
        figures_section(results),
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
