"""Model card of an export, in the format of the Hugging Face Hub: README.md beside the encoders."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from avcl_jax import experiment
from avcl_jax.export.encoder import Encoder, flatten
from avcl_jax.page import metric_texts

NAME = "README.md"
# Metrics of what an evaluation compares a run with, by the end of their names.
_BASELINES = ("_random", "_supervised", "_gap_closed")


def model_card(
    encoders: Mapping[str, Encoder],
    config: ml_collections.ConfigDict,
    results: Mapping[str, Any] | None,
    *,
    license: str,
) -> str:
    """Describes encoders of a run: how to load them, what trained them, what they reach.

    Args:
        encoders: encoder of each modality.
        config: config of the run.
        results: contents of its results.json; None if it was not evaluated.
        license: identifier from the Hub's list, such as "apache-2.0".
    """
    return "\n".join(
        [
            "---",
            *_header(encoders, config, results, license),
            "---",
            "",
            f"# {config.name}",
            "",
            *_usage(encoders),
            *_training(encoders, config),
            *_evaluation(results),
        ]
    )


def _header(
    encoders: Mapping[str, Encoder],
    config: ml_collections.ConfigDict,
    results: Mapping[str, Any] | None,
    license: str,
) -> Iterator[str]:
    yield f"license: {json.dumps(license)}"
    yield "library_name: avcl-jax"
    yield "pipeline_tag: feature-extraction"
    yield "tags:"
    tags = ["self-supervised", "contrastive-learning", *encoders, "jax", "flax", "safetensors"]
    yield from (f"- {tag}" for tag in tags)
    if results is None:
        return
    yield "model-index:"
    yield f"- name: {json.dumps(config.name)}"
    yield "  results:"
    yield "  - task: {type: feature-extraction}"
    yield f"    dataset: {{type: records, name: {json.dumps(results['data']['test'])}}}"
    yield "    metrics:"
    for name, metric in _own(results).items():
        written = {"type": name, "name": metric["what"], "value": round(metric["value"], 4)}
        yield f"    - {json.dumps(written, ensure_ascii=False)}"


def _usage(encoders: Mapping[str, Encoder]) -> Iterator[str]:
    names = " and ".join(encoders)
    yield f"Encoders of {names}, trained without labels by avcl-jax (contrast and temporal tasks)."
    yield ""
    yield "```python"
    yield "from avcl_jax import load_encoder"
    yield ""
    for modality in encoders:
        yield f'{modality}_encoder = load_encoder("hf://USER/REPOSITORY/{modality}")  # or a folder'
    if "video" in encoders:
        yield "features = video_encoder(frames, fps)  # uint8 [time, height, width, 3] of any size"
    if "audio" in encoders:
        yield "features = audio_encoder(waveform, sample_rate_hz)  # [samples], int16 or float"
    yield "```"
    yield ""
    yield "| | architecture | parameters | one clip | features |"
    yield "|---|---|---|---|---|"
    for modality, encoder in encoders.items():
        count = sum(np.size(array) for array in flatten(encoder.params["params"]).values())
        cut = encoder.preprocess
        clip = np.zeros((1, *cut.clip_shape), cut.clip_dtype)
        features = jax.eval_shape(encoder.apply, encoder.params, clip)
        yield (
            f"| {modality} | {encoder.config['encoder']['class']} | {count:,} "
            f"| {cut.clip_seconds:g} s, "
            f"{' × '.join(map(str, encoder.input_shape))} | {features.shape[-1]} |"
        )
    yield ""


def _training(encoders: Mapping[str, Encoder], config: ml_collections.ConfigDict) -> Iterator[str]:
    source = next(iter(encoders.values())).config["source"]
    yield "## Training"
    yield ""
    yield (
        f"{source['step']:,} steps of {config.global_batch_size} records, two views each, seed "
        f"{config.seed}; records `{source['data']}`. Code of avcl-jax, versions "
        + ", ".join(f"{name} {version}" for name, version in source["versions"].items())
        + "."
    )
    yield ""
    yield "<details><summary>All settings</summary>"
    yield ""
    yield "```"
    for key, value in sorted(experiment.flatten(config.to_dict()).items()):
        if experiment.is_decisive(key):
            yield f"{key} = {value!r}"
    yield "```"
    yield ""
    yield "</details>"
    yield ""


def _evaluation(results: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## Evaluation"
    yield ""
    if results is None:
        yield (
            "Not evaluated. Nothing is known about other data than the records above, nor that the "
            "features carry any class: measure before use (`configs/evaluate.py`)."
        )
        yield ""
        return
    yield (
        f"On the {results['units']} records of `{results['data']['test']}`, which were not trained "
        "on, with 95 % intervals. Nothing is known about other data."
    )
    yield ""
    yield "| | value | 95 % interval | chance |"
    yield "|---|---|---|---|"
    for metric in results["metrics"].values():
        value, low, high, chance = metric_texts(metric)
        yield f"| {metric['what']} | {value} | {low} to {high} | {chance} |"
    yield ""


def _own(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metrics of the run itself, without those of what it is compared with."""
    metrics = results["metrics"].items()
    return {name: metric for name, metric in metrics if not name.endswith(_BASELINES)}
