"""Ablations: pretraining with parts of the method left out, several seeds each.

    python -m avcl_jax.main --config=configs/ablation.py --workdir=runs/ablation

Every variant and seed is a pretraining run of its own under WORKDIR/VARIANT/seedN, which resumes
where it was stopped, evaluated as `configs/evaluate.py` does it. Several machines may share the
work: each runs some of the variants (`--config.ablation.only=...`) on one WORKDIR.
"""

from __future__ import annotations

import copy
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from etils import epath
from scipy import stats

from avcl_jax import experiment
from avcl_jax.errors import UserError
from avcl_jax.evaluation import charts
from avcl_jax.evaluation.evaluate import PROTOCOL, evaluate, open_evaluation_records, probe_name
from avcl_jax.evaluation.protocol import REPORT, RESULTS, finite
from avcl_jax.evaluation.splits import count_trained_on
from avcl_jax.page import as_text, definitions, page, section, table, text
from avcl_jax.paths import absolute_path, write_bytes
from avcl_jax.training.loop import pretrain
from avcl_jax.training.program import build, loss_spec
from avcl_jax.training.trained_records import open_records
from avcl_jax.versions import versions

_EVALUATE = "avcl_jax.evaluation.evaluate:evaluate"

# Raised whenever the same runs would give other metrics.
VERSION = 2
# The variant that the others are compared with.
FULL = "full"
# Intervals are for one comparison at a time; the page says so.
CONFIDENCE = 0.95


class Effect(NamedTuple):
    """Effect of leaving a part out on one metric.

    `values` by seed and their `mean`; `difference` is the mean over seeds of the variant minus the
    whole method with the same seed, between `low` and `high` by Student's t (infinite with one).
    """

    values: tuple[float, ...]
    mean: float
    difference: float
    low: float
    high: float


# Metric -> variant -> effect; None where the variant does not have the metric.
Effects = Mapping[str, Mapping[str, Effect | None]]


def variant_config(
    config: ml_collections.ConfigDict, variant: str, seed: int
) -> ml_collections.ConfigDict:
    """Returns the config of one run: that of the sweep with what the variant changes.

    Raises:
        UserError: if the variant changes a setting that does not exist or that its encoder ignores.
    """
    run = copy.deepcopy(config)  # with references: a computed setting follows what changes
    changes = dict(dict(run.ablation.variants)[variant])
    with run.unlocked():
        del run.ablation
    run.lock()
    run.name = f"{config.name} {variant}"
    run.seed = seed
    try:
        run.update_from_flattened_dict(changes)
        experiment.check_numbers(run)
    except (KeyError, AttributeError, TypeError, UserError) as error:
        raise UserError(f"variant {variant!r} cannot be built: {error}") from error
    experiment.check_used(run, changes)
    return run


def variants_of(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the names of "full" and of the variants that differ from it in this config.

    Raises:
        UserError: if there is no variant "full" or no seed, or a variant has an unknown setting.
    """
    names = [name for name, _ in config.ablation.variants]
    if FULL not in names or not config.ablation.seeds:
        raise UserError(f"ablation.variants must contain {FULL!r}, and ablation.seeds a seed")
    texts = {name: experiment.to_json(variant_config(config, name, 0)) for name in names}
    full = texts[FULL]
    return [n for n in names if n == FULL or experiment.decisive_differences(full, texts[n])]


def ablate(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    *,
    pretrain: Callable[[ml_collections.ConfigDict, epath.Path], None] = pretrain,
    evaluate: Callable[[ml_collections.ConfigDict, epath.Path], object] = evaluate,
) -> dict[str, Any] | None:
    """Runs the missing part of a sweep, and writes results.json, ablation.md and report.html.

    Args:
        pretrain: trains a run to its end.
        evaluate: writes results.json of a trained run.

    Returns:
        The contents of results.json; None where `ablation.only` left variants to other machines
        that have not finished them.

    Raises:
        UserError: before the first training, if a variant or a metric does not exist, or a variant
            cannot be trained or evaluated.
    """
    workdir = absolute_path(workdir)
    variants, seeds = variants_of(config), list(config.ablation.seeds)
    ours = list(config.ablation.only) or variants
    if unknown := [name for name in ours if name not in variants]:
        raise UserError(
            f"ablation.only names {', '.join(unknown)}, there are {', '.join(variants)}"
        )
    runs = {
        (v, s): (variant_config(config, v, s), workdir / v / f"seed{s}")
        for s in seeds
        for v in variants
    }
    left = [key for key in runs if key[0] in ours and not _results(*runs[key])]
    # Seeds decide nothing of this. Runs that are measured need no records any more.
    for variant, seed in dict(reversed(left)).items():
        _check_run(variant, *runs[variant, seed])
    _check_metrics(config)
    # Seed by seed, so that a sweep that is stopped has whole comparisons.
    for (variant, seed), (run, directory) in runs.items():
        if (variant, seed) in left:
            print(f"\nablation: {variant}, seed {seed}: {directory}", flush=True)
            pretrain(_task(run, experiment.PRETRAIN), directory)
            evaluate(_task(run, _EVALUATE), directory)
        elif variant in ours:
            print(f"ablation: {variant}, seed {seed} is measured", flush=True)
    found = {key: results for key, run in runs.items() if (results := _results(*run))}
    if missing := [f"{v} seed {s}" for v, s in runs if (v, s) not in found]:
        print(f"ablation: {len(missing)} runs are not finished yet, first {missing[0]}", flush=True)
        return None
    (first, results), *others = ((f"{v} seed {s}", found[v, s]) for v, s in runs)
    for other, of_other in others:
        if of_other["data"] != results["data"]:
            raise UserError(
                f"{other} was measured on other data than {first}: delete its directory in the "
                "workdir, or that of the other"
            )
    return _write(config, workdir, found, variants, seeds)


def _check_metrics(config: ml_collections.ConfigDict) -> None:
    """Refuses metrics that the whole method does not train or measure."""
    trained = [term for term, weight in loss_spec(config).weights.items() if weight]
    probes = [probe_name(*probe) for probe in config.evaluation.probes]
    recalls = [f"r{k}" for k in config.evaluation.recall_at]
    for title, path, term in config.ablation.metrics:
        kind, key, last = path.split(".", 2)
        checks = (
            (bool(term), term, "train", "loss.weights", trained),
            (kind == "probe", key, "measure", "evaluation.probes", probes),
            (last[1:].isdigit(), last, "measure", "evaluation.recall_at", recalls),
        )
        for applies, name, verb, setting, known in checks:
            if applies and name not in known:
                raise UserError(
                    f"ablation.metrics has {title!r} at {path}"
                    + f" of the loss term {term!r}" * bool(term)
                    + f", which variant {FULL!r} does not {verb}; it {verb}s "
                    f"{', '.join(known) or 'none'}: set ablation.metrics or {setting}"
                )


def _check_run(variant: str, run: ml_collections.ConfigDict, directory: epath.Path) -> None:
    """Refuses a run that could not be trained, or not be evaluated after its training."""
    training, step = _task(run, experiment.PRETRAIN), "trained"
    try:
        mesh, _, _ = build(training)
        trained_on = open_records(training, mesh)
        step = "evaluated"
        _, records = open_evaluation_records(training, _task(run, _EVALUATE), directory)
    except UserError as error:
        raise UserError(f"variant {variant!r} cannot be {step}: {error}") from error
    test = records["test"]
    met = count_trained_on(trained_on.fingerprint, test.records, test.indices)
    if met and not run.data.allow_trained_on:
        raise UserError(
            f"variant {variant!r} would be pretrained, without labels, on {met} of its "
            f"{len(test)} test records: set data.select, evaluation.test_split or "
            "data.allow_trained_on=True"
        )


def _task(run: ml_collections.ConfigDict, task: str) -> ml_collections.ConfigDict:
    config = run.copy_and_resolve_references()
    with config.unlocked():
        config.task = task
        if task == experiment.PRETRAIN:
            del config.evaluation, config.bootstrap, config.data.allow_trained_on
        else:  # which renders in threads alone
            config.execution.threads = max(config.execution.threads, config.execution.workers)
    return config


def _results(run: ml_collections.ConfigDict, directory: epath.Path) -> dict[str, Any] | None:
    """Returns the results of a run if they exist, of this protocol and with these settings."""
    path = directory / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if (results["protocol"], results["protocol_version"]) != (PROTOCOL.name, PROTOCOL.version):
        return None
    differing = experiment.decisive_differences(
        json.dumps(results["config"]), experiment.to_json(_task(run, _EVALUATE))
    )
    return None if differing else results


def effect(values: Sequence[float], full: Sequence[float]) -> Effect:
    """Compares the seeds of a variant, [seeds], with the same seeds of the whole method."""
    differences = np.subtract(values, full)
    mean, count = float(differences.mean()), len(differences)
    low, high = (mean, mean) if count > 1 else (-np.inf, np.inf)
    if differences.std():
        error = stats.sem(differences)
        low, high = stats.t.interval(CONFIDENCE, count - 1, loc=mean, scale=error)
    return Effect(tuple(map(float, values)), float(np.mean(values)), mean, float(low), float(high))


def effects(
    results: Mapping[tuple[str, int], Mapping[str, Any]],
    columns: Sequence[tuple[str, str, str]],
    variants: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, dict[str, Effect | None]]:
    """Returns the effect of every variant on every metric, by title and variant.

    An effect is None where a variant does not have the metric, or was not trained for it:
    retrieval without an objective across modalities still says something, the head of a temporal
    task that was left out does not.

    Args:
        results: results.json of each (variant, seed).
        columns: title of each metric, its path (keys of results.json joined by dots), and the loss
            term without which it is meaningless, or "".
        variants: names, "full" among them.

    Raises:
        UserError: if the whole method lacks a metric.
    """

    def values(variant: str, path: str, term: str) -> list[float] | None:
        runs: list[Any] = [results[variant, seed] for seed in seeds]
        if term and not all(run["config"]["loss"]["weights"][term] for run in runs):
            return None
        try:
            return [float(functools.reduce(operator.getitem, path.split("."), run)) for run in runs]
        except KeyError:
            return None

    compared: dict[str, dict[str, Effect | None]] = {}
    for title, path, term in columns:
        if (full := values(FULL, path, term)) is None:
            raise UserError(
                f"runs of {FULL!r} have no {path}, or are not trained for it: correct "
                "ablation.metrics"
            )
        found = {variant: values(variant, path, term) for variant in variants}
        compared[title] = {v: None if of is None else effect(of, full) for v, of in found.items()}
    return compared


def _write(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    found: Mapping[tuple[str, int], Mapping[str, Any]],
    variants: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    compared = effects(found, config.ablation.metrics, variants, seeds)
    results = {
        "protocol": "ablation",
        "protocol_version": VERSION,
        "sweep": config.name,
        "seeds": seeds,
        "effects": {
            what: {
                v: e and {**e._asdict(), "low": finite(e.low), "high": finite(e.high)}
                for v, e in by_variant.items()
            }
            for what, by_variant in compared.items()
        },
        "train_seconds": {v: [found[v, seed]["train_seconds"] for seed in seeds] for v in variants},
        "versions": versions(),
        "config": json.loads(experiment.to_json(config)),
    }
    markdown = as_table(compared, variants)
    report = _report(config, compared, variants, seeds)
    written = json.dumps(results, indent=2, allow_nan=False) + "\n"
    for name, content in (("ablation.md", f"{markdown}\n"), (REPORT, report), (RESULTS, written)):
        write_bytes(workdir / name, content.encode())
    print(f"\n{markdown}\n\nreport  {workdir / REPORT}", flush=True)
    return results


def as_table(compared: Effects, variants: Sequence[str]) -> str:
    """Returns the effects in Markdown, in points.

    The whole method has its metrics and their range over seeds, the others the difference to it
    and half the width of its interval.
    """
    lines = [["", *compared], ["---"] * (len(compared) + 1), *_rows(compared, variants)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _rows(compared: Effects, variants: Sequence[str]) -> list[list[str]]:
    columns = compared.values()
    return [[v.replace("_", " "), *(_cell(column[v], v) for column in columns)] for v in variants]


def _cell(found: Effect | None, variant: str) -> str:
    if found is None:
        return "–"
    if variant == FULL:
        mean, low, high = (
            as_text(value).removesuffix(" %")
            for value in (found.mean, min(found.values), max(found.values))
        )
        return f"{mean} ({low} to {high})"
    half = f" ±\u00a0{50 * (found.high - found.low):.1f}"  # Student's interval is symmetric
    return as_text(found.difference, signed=True) + half * bool(np.isfinite(found.low))


def _report(
    config: ml_collections.ConfigDict,
    compared: Effects,
    variants: Sequence[str],
    seeds: Sequence[int],
) -> str:
    panels = {
        what: {
            v.replace("_", " "): (*e[2:], np.subtract(e.values, full.values).tolist())
            for v, e in by_variant.items()
            if v != FULL and e and full
        }
        for what, by_variant in compared.items()
        for full in [by_variant[FULL]]
    }
    changes = {
        name.replace("_", " "): "; ".join(f"{setting} = {value}" for setting, value in settings)
        for name, settings in config.ablation.variants
        if name in variants
    }
    return page(
        title="Ablations",
        body="<h1>Effect of each part of the method</h1>"
        + section(
            "Change when a part is left out",
            "In points. Dots are seeds, bars their 95 % interval; left of zero the part helped.",
            charts.interval_chart(panels, name="ablation"),
        )
        + section(
            "Metrics",
            "In points. Differences are to the whole method with the same seed; ± is half of the "
            f"interval by Student's t over {len(seeds)} seeds, for one comparison at a time. With "
            f"{sum(map(len, panels.values()))} comparisons some exclude zero by chance alone, and "
            "with so few seeds an interval that includes zero does not show that a part is "
            "useless. Seeds change the training, the videos stay the same. A dash: the variant was "
            "not trained for that task.",
            table(["", *compared], _rows(compared, variants)),
        )
        + section("Variants", "Settings that each changes.", definitions(changes))
        + section(
            "Configuration",
            f"Seeds {', '.join(map(str, seeds))}.",
            f"<pre>{text(experiment.to_json(config))}</pre>",
        ),
    )
