"""The protocol driver: checks, runs a protocol in all processes, writes its results.

A protocol is a definition (`PROTOCOL`), a `compute` that runs in all processes, which share its
records, and a `measure` that runs in process 0 and turns what was computed into `Measured`. Every
protocol writes into its workdir:

- results.json: protocol and version, config, fingerprints of encoder and data, versions of the
  libraries, and each metric with its bootstrap interval over sources;
- outcomes.npz: values that the metrics were computed from (`evaluation.protocol`);
- report.html: the same for people, with the protocol's own sections.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import ml_collections
from etils import epath

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.evaluation.protocol import (
    OUTCOMES,
    REPORT,
    RESULTS,
    Measured,
    Protocol,
    estimate,
    write_outcomes,
)
from avcl_jax.evaluation.splits import Split, Trial, check_not_trained_on
from avcl_jax.export.runs import EncoderSource, random_like
from avcl_jax.page import definitions, metric_texts, page, section, table, text, times_chance
from avcl_jax.paths import absolute_path, write_bytes
from avcl_jax.processes import check_same
from avcl_jax.training.metrics import peak_memory_gb
from avcl_jax.versions import versions

Computed = TypeVar("Computed")


@dataclasses.dataclass(frozen=True)
class Context:
    """One run of a protocol: its identity, its surroundings and its files.

    Attributes:
        encoder: encoder that the results name; of several, all of them as one.
        data: fingerprints of the records by role.
        heads: digest of the heads that are measured with the encoder; None without heads.
        in_training: `workdir` is that of the evaluated pretraining run, where results of an
            earlier checkpoint are replaced. Any other protocol refuses such a directory, and never
            overwrites results of other settings.
        seconds: duration of each stage.
    """

    protocol: Protocol
    config: ml_collections.ConfigDict
    workdir: epath.Path
    encoder: EncoderSource
    data: Mapping[str, str]
    heads: str | None = None
    in_training: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def stages(self, name: str) -> Iterator[None]:
        """Prints and records the duration of a stage."""
        began = time.monotonic()
        print(f"evaluation: {name} …", end="", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f" {self.seconds[name]:.0f} s", flush=True)

    @property
    def total_seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the metrics; settings of execution do not."""
        settings = experiment.flatten(self.config.to_dict())
        kept = {k: v for k, v in settings.items() if experiment.is_decisive(k)}
        parts = [self.protocol.name, self.protocol.version, kept, dict(self.data)]
        parts += [self.encoder.fingerprint, self.heads]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()

    @property
    def directory(self) -> epath.Path:
        """Cache of long computations; another version of the protocol has another."""
        return self.workdir / "features" / f"{self.protocol.name}-{self.protocol.version}"

    def random(self) -> dict[str, EncoderSource]:
        """Returns {"random": encoders with newly drawn weights}, or {} if the config has none."""
        if not self.config.baselines.random:
            return {}
        return {"random": random_like(self.encoder, self.config.seed)}

    def finished(self) -> dict[str, Any] | None:
        """Returns the results in the workdir if they are those of this run, and prints so.

        Otherwise checks that the directory can be written to, before anything is computed.
        """
        if (results := self._results()) is not None:
            print(f"{self.workdir} already holds these results")
            self._print_paths()
        elif jax.process_index() == 0:
            try:
                new = not self.workdir.exists()
                self.workdir.mkdir(parents=True, exist_ok=True)
                (trial := self.workdir / f"{RESULTS}.trial").write_text("")
                trial.unlink()
                # A run that is refused later leaves nothing behind. Not empty: another process has
                # begun to write.
                with contextlib.suppress(ValueError):
                    if new:
                        self.workdir.rmdir()
            except OSError as error:
                raise UserError(
                    f"{self.workdir} cannot be written to ({error}): choose another --workdir"
                ) from error
        return results

    def _results(self) -> dict[str, Any] | None:
        """Returns the results in the workdir if they are whole and those of this run."""
        problem = ""
        if (path := self.workdir / RESULTS).exists():
            results = json.loads(path.read_text())
            if results.get("protocol") != self.protocol.name:
                problem = f"holds the results of {results.get('protocol', 'another program')}"
            elif results["fingerprint"] == self.fingerprint:
                whole = all((self.workdir / name).exists() for name in (OUTCOMES, REPORT))
                return results if whole else None
            elif not self.in_training:
                problem = (
                    "holds results of this protocol with another encoder, other data, other "
                    "settings or another version of it, which you may delete"
                )
        elif (self.workdir / "checkpoints").exists() and not self.in_training:
            problem = "is the workdir of a training run"
        if problem:
            raise UserError(f"{self.workdir} {problem}: choose another --workdir")
        return None

    def _print_paths(self) -> None:
        print(f"report  {self.workdir / REPORT}\nresults {self.workdir / RESULTS}", flush=True)

    def write(self, measured: Measured) -> dict[str, Any]:
        """Writes all files, prints the metrics, and returns results.json.

        Raises:
            UserError: if metrics and outcomes do not fit; nothing is then written.
        """
        config, encoder = self.config, self.encoder
        metrics = estimate(measured, resamples=config.bootstrap.resamples, seed=config.seed)
        results = {
            "protocol": self.protocol.name,
            "protocol_version": self.protocol.version,
            "metrics": metrics,
            "details": dict(measured.details),
            "units": len(measured.outcomes.units),
            "sources": len(set(measured.outcomes.sources)),
            "encoder": {name: getattr(encoder, name) for name in ("path", "fingerprint", "step")}
            | {"heads": self.heads},
            "data": dict(self.data),
            "fingerprint": self.fingerprint,
            "seed": config.seed,
            "seconds": round(self.total_seconds, 1),
            "stages": self.seconds,
            "peak_memory_gb": round(peak_memory_gb(), 3),
            "versions": versions(),
            "config": json.loads(experiment.to_json(config)),
            **measured.view,
        }
        report = _report(self.protocol, measured, results)
        written = json.dumps(results, indent=2, allow_nan=False)  # may raise: before any file
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_outcomes(self.workdir / OUTCOMES, measured.outcomes)
        write_bytes(self.workdir / REPORT, report.encode())
        write_bytes(self.workdir / RESULTS, f"{written}\n".encode())
        for metric in metrics.values():
            value, low, high, chance = metric_texts(metric)
            known = "" if metric["chance"] is None else f", chance {chance}"
            print(f"{metric['what']:40s} {value} (95 %: {low} to {high}{known})")
        self._print_paths()
        return results


def run_protocol(
    protocol: Protocol,
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    splits: Sequence[Trial[Any]],
    *,
    compute: Callable[[Context], Computed],
    measure: Callable[[Context, Computed], Measured],
    encoder: EncoderSource | None = None,
    data: Mapping[str, str] | None = None,
    heads: str | None = None,
    in_training: bool = False,
) -> dict[str, Any]:
    """Runs a protocol, unless its results exist, and writes its results.

    The other arguments are fields of `Context`; None for encoder and records of the splits.

    Args:
        config: also read here: `bootstrap.resamples`, `seed`, `execution`, `data.allow_trained_on`.
        workdir: output directory, local or gs://; made if needed.
        compute: long computations, in all processes.
        measure: metrics and report of what was computed, in process 0.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        UserError: if an encoder was pretrained on its test records, or the directory has results of
            something else, or cannot be written to.
    """
    if encoder is None:
        encoder = combined(config.encoder if "encoder" in config else "", splits)
    if data is None:
        train = [split.train.fingerprint for split in splits if isinstance(split, Split)]
        roles = {"train": train, "test": [split.test.fingerprint for split in splits]}
        data = {role: "; ".join(dict.fromkeys(names)) for role, names in roles.items() if names}
    facts = {f"the {role} data": name for role, name in data.items()}
    check_same(facts | {"the encoder": encoder.fingerprint})
    directory = absolute_path(workdir)
    context = Context(protocol, config, directory, encoder, data, heads, in_training)
    if (done := context.finished()) is not None:
        return done
    for split in splits:
        check_not_trained_on(
            split.encoder,
            split.test.records,
            split.test.indices,
            allow=config.data.allow_trained_on,
            what=f"test records of {split.test}",
        )
    computed = compute(context)
    return {} if jax.process_index() else context.write(measure(context, computed))


def combined(path: str, splits: Sequence[Trial[Any]]) -> EncoderSource:
    """Returns the encoder of all splits; several as one, with a fingerprint of them all."""
    sources = {split.encoder.fingerprint: split.encoder for split in splits}
    first, *others = sources.values()
    if not others:
        return first
    return dataclasses.replace(
        first,
        path=path,
        fingerprint=hashlib.sha256(" ".join(sources).encode()).hexdigest(),
        step=first.step if all(other.step == first.step for other in others) else None,
        trained_on=None,
    )


def _report(protocol: Protocol, measured: Measured, results: Mapping[str, Any]) -> str:
    """Returns the report of any protocol; `results` are the contents of results.json."""
    rows, tiles = [], ""
    for name, metric in results["metrics"].items():
        value, low, high, chance = metric_texts(metric)
        # A large rank is a bad one: only shares are multiples of chance.
        times = times_chance(metric["value"], metric["chance"]) if metric["unit"] == "share" else ""
        rows.append([metric["what"], value, f"{low} … {high}", chance, times])
        if measured.metrics[name].headline:
            what = metric["what"] + (f", {times}\u00a0chance" if times else "")
            tiles += f'<div class="tile"><b>{value}</b><span>{text(what)}</span></div>'
    about = {
        "protocol": f"{protocol.name}, version {protocol.version}",
        "encoder": results["encoder"]["path"],
        "encoder fingerprint": results["encoder"]["fingerprint"],
        **{f"data: {role}": value for role, value in results["data"].items()},
        "units": f"{results['units']} of {results['sources']} sources",
        "seed": results["seed"],
        "took": f"{results['seconds']} s",
        **measured.about,
    }
    steps = "".join(f"<li>{text(s)}</li>" for s in protocol.definition)
    title = measured.title or protocol.title
    further = {
        "Configuration": results["config"],
        "Versions": results["versions"],
        "All results": {k: v for k, v in results.items() if k != "config"},
    }
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="lead">{measured.lead}</p>' if measured.lead else "",
        f'<div class="tiles">{tiles}</div>',
        *measured.sections,
        section(
            "Metrics",
            f"With 95 % intervals from {results['config']['bootstrap']['resamples']} bootstrap "
            "resamples of the sources: they cover other videos of this kind, not another training.",
            table(["", "value", "interval", "chance", "× chance"], rows),
        ),
        section(
            "Run",
            "Everything needed to run it again.",
            definitions(about),
            f"<details open><summary>Protocol</summary><ul>{steps}</ul></details>",
            *(
                f"<details><summary>{name}</summary>"
                f"<pre>{text(json.dumps(content, indent=2))}</pre></details>"
                for name, content in further.items()
            ),
        ),
    ]
    return page(title=title, body="".join(parts))
