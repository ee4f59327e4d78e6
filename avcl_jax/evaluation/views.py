"""Views of records as training renders them, and the outputs of a run's model for them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.batched import Render, batched_map, cache_key, in_parts, stack
from avcl_jax.data.images import center_crop, random_crop
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.rendering import describe, render_views
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.data.views import Clip, draw_views, feasible_speeds, fixed_clips
from avcl_jax.errors import UserError
from avcl_jax.evaluation.driver import Context
from avcl_jax.export.runs import EncoderSource, heads_digest, load_run, source_of_run
from avcl_jax.objectives.temporal import TASKS
from avcl_jax.training.inputs import prepare_inputs

MODALITY_INPUTS = {"video": "video", "audio": "spectrogram"}
MODEL_INPUTS = ("video", "spectrogram", "has_video", "has_audio")


@dataclasses.dataclass(frozen=True)
class PretrainedRun:
    """A pretraining run: its encoders, and all variables of the joint model with its heads."""

    config: ml_collections.ConfigDict
    source: EncoderSource
    variables: Mapping[str, Any]
    step: int

    @classmethod
    def load(cls, path: epath.PathLike) -> PretrainedRun:
        """Loads the newest checkpoint of the run at `path`.

        Raises:
            ExportError: if `path` is not a run.
            UserError: if the run is older than a temporal task, and lacks its head.
        """
        config, variables, step = load_run(path)
        source = source_of_run(path, config, variables, step)
        needed = [n for n, task in TASKS.items() if source.encoders.keys() >= set(task.reads)]
        known = [name for name in needed if f"{name}_head" in variables["params"]]
        if lacking := [name for name in needed if name not in known]:
            raise UserError(
                f"{source.path} has heads of the temporal tasks {', '.join(known) or 'none'}, and "
                f"lacks {', '.join(lacking)}: pretrain again, or use the version that trained it"
            )
        return cls(config, source, variables, step)

    @property
    def spec(self) -> RenderSpec:
        """Rendering of its views, with spectrograms on the host."""
        return host_render_spec(self.config)

    @functools.cached_property
    def heads(self) -> str:
        """Digest of the projection and temporal heads."""
        return heads_digest(self.variables)

    def outputs(self, variables: Any, pairs: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Maps pairs of views, as training batches have them, to all outputs of the model."""
        model: Any = experiment.audio_visual_model(self.config)
        mean, std = self.config.pixels.mean, self.config.pixels.std
        inputs: Any = prepare_inputs(
            pairs, self.spec, pixel_mean=mean, pixel_std=std, augmentation=None, key=None
        )
        return model.apply(variables, **inputs, train=False)

    def features(self, variables: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Maps stacked `fixed_views` to features and embeddings.

        Returns:
            float32 [videos, channels] arrays `video_features`, `audio_features`,
            `video_embeddings` and `audio_embeddings`. Features are means over the views. Embeddings
            of all views are concatenated, so that the cosine of two videos is the mean similarity
            of their views of the same times: video and audio share when something happens, which a
            mean over views would drop.
        """
        videos, views = arrays["video"].shape[:2]
        # The model takes pairs of views; of an odd number the last one is paired with itself.
        places = np.minimum(np.arange(views + views % 2), views - 1)
        pairs = {
            name: jnp.asarray(arrays[name])[:, places].reshape(-1, 2, *arrays[name].shape[2:])
            for name in MODALITY_INPUTS.values()
        }
        masks = {f"has_{m}": arrays[f"has_{m}"].repeat(len(places) // 2) for m in MODALITY_INPUTS}
        outputs = {}
        for name, value in self.outputs(variables, pairs | masks).items():
            by_view = value.reshape(videos, -1, value.shape[-1])[:, :views]
            if name.endswith("_features"):
                outputs[name] = by_view.mean(axis=1)
            elif name.endswith("_embeddings"):
                outputs[name] = by_view.reshape(videos, -1)
        return outputs

    def logits(self, variables: Any, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Maps stacked `drawn_pairs` to logits [videos, pairs, …] of all temporal tasks."""
        videos, pairs = arrays["has_video"].shape
        flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}
        outputs = self.outputs(variables, flat)
        return {n: v.reshape(videos, pairs, *v.shape[1:]) for n, v in outputs.items() if n in TASKS}


def host_render_spec(config: ml_collections.ConfigDict) -> RenderSpec:
    """Returns a run's rendering with spectrograms on the host, which agree to 1e-4 by test."""
    return dataclasses.replace(experiment.render_spec(config), spectrogram_on_device=False)


def speed_indices(asked: Sequence[int], trained: Sequence[int], *, setting: str) -> list[int]:
    """Returns the indices of playback speeds among the trained ones.

    Raises:
        UserError: naming `setting`, if one was not trained.
    """
    if unknown := [speed for speed in asked if speed not in trained]:
        raise UserError(
            f"{setting} {', '.join(map(str, unknown))} were not trained, these were: "
            f"{', '.join(map(str, trained))}: set --config.{setting}"
        )
    return [list(trained).index(speed) for speed in asked]


def open_run(config: ml_collections.ConfigDict) -> tuple[PretrainedRun, UsableRecords]:
    """Loads the run and opens the records that a protocol's config names.

    Raises:
        ExportError: if `config.encoder` is not a run.
        UserError: if records lack a modality of the run, or no view fits any record.
    """
    run, data = PretrainedRun.load(config.encoder), config.data
    dataset = RecordDataset(data.directory, data.split)
    records = UsableRecords(dataset, run.spec, Selection.parse(data.select))
    modalities = tuple(run.source.encoders)
    lacking = records.lacking(modalities)
    if len(lacking) and not data.leave_out:
        raise UserError(
            f"{len(lacking)} of the {records.num_selected} records of {records.fingerprint} lack "
            f"{' or '.join(modalities)} or are too short for a view, first "
            f"{dataset.record_ids[int(lacking[0])]!r}: set data.leave_out=True to skip them"
        )
    return run, records


def fixed_views(
    source: UsableRecords,
    position: int,
    spec: RenderSpec,
    *,
    speeds: Sequence[int],
    clips: int,
) -> dict[str, Any]:
    """Renders uniformly spaced centre-crop views of one record, forward, `clips` at each speed.

    Speeds are indices into `spec.views.speeds`, as `data.views.fixed_clips` takes them. Returns the
    arrays of `render_views` and `describe`.
    """
    index, record, use = source[position]
    views = fixed_clips(use, spec.views, speeds, clips)
    crop = center_crop(record.height, record.width)
    arrays = render_views(record, use, views, views, [crop] * len(views), spec)
    # Views of a record are averaged, so that it has audio even if some of them are silent.
    described = describe(index, source.records)
    return arrays | described | {"has_audio": np.bool_(use.has_audio)}


def random_views(
    source: UsableRecords,
    position: int,
    spec: RenderSpec,
    *,
    speeds: Sequence[int],
    directions: Sequence[int],
    views: int,
    seed: int,
    modalities: Sequence[str] = ("video", "audio"),
) -> dict[str, Any]:
    """Renders `views` views of one record at random times and crops, as `fixed_views` returns them.

    The combinations of speed and direction take turns, so that `views` divisible by their number
    gives each equally often: labels are balanced exactly, record by record.

    Args:
        speeds: indices into `spec.views.speeds`; those too fast for the record are left out.
        directions: some of `FORWARD` and `BACKWARD`.
        modalities: modalities that are rendered; the input of the other one is left out.
    """
    index, record, use = source[position]
    has = {f"has_{m}": getattr(use, f"has_{m}") and m in modalities for m in MODALITY_INPUTS}
    use = dataclasses.replace(use, **has)
    rng = np.random.default_rng(np.random.SeedSequence([seed, position]))
    feasible = feasible_speeds(use, spec.views)
    usable = [speed for speed in speeds if speed in feasible] or feasible[:1]
    clips = []
    for speed, direction in itertools.islice(
        itertools.cycle(itertools.product(usable, directions)), views
    ):
        slack = use.duration_seconds - spec.views.clip_seconds * spec.views.speeds[speed]
        start = use.start_seconds + max(slack, 0.0) * rng.uniform()
        clips.append(Clip(float(start), speed, direction))
    height, width = max(record.height, 1), max(record.width, 1)
    crops = [random_crop(rng, height, width, spec.crop) for _ in clips]
    arrays = render_views(record, use, clips, clips, crops, spec)
    for modality in MODALITY_INPUTS.keys() - set(modalities):
        del arrays[MODALITY_INPUTS[modality]]
    described = describe(index, source.records)
    return arrays | described | {"has_audio": np.bool_(use.has_audio)}


def drawn_pairs(
    source: UsableRecords, position: int, spec: RenderSpec, *, pairs: int, seed: int
) -> dict[str, Any]:
    """Renders pairs of views of one record, drawn as in training but cropped in the centre, as the
    arrays of a training batch with `pairs` rows.

    Video and audio of a view are of one playback also where `spec` has an independent audio
    transform: two runs are shown the same views. With a transform of their own, intervals that do
    not overlap lie further apart, and order is easier to tell.
    """
    index, record, use = source[position]
    rng = np.random.default_rng(np.random.SeedSequence([seed, position]))
    views = dataclasses.replace(spec.views, audio_transform="shared")
    crop = center_crop(record.height, record.width)
    rows = []
    for _ in range(pairs):
        pair = draw_views(rng, use, views, record.frame_seconds)
        arrays = render_views(record, use, pair.video, pair.audio, [crop] * 2, spec)
        rows.append(arrays | pair.labels() | describe(index, source.records))
    return stack(rows)


def encode(
    context: Context,
    run: PretrainedRun,
    function: Callable[[Any, Mapping[str, Any]], dict[str, jax.Array]],
    render: Render,
    records: UsableRecords,
    *,
    key: Sequence[Any],
    networks: Mapping[str, Any] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> dict[str, np.ndarray]:
    """Maps rendered records to outputs of networks, as `batched_map`, in cached parts.

    Args:
        function: `run.features` or `run.logits`.
        key: further identity of the arrays, JSON, besides run and records.
        networks: variables of the joint model by name; None for {"run": those of the run}.
        keep: tells by name which arrays are stored and returned.

    Returns:
        Arrays [records, …] in process 0, nothing elsewhere.
    """
    settings = context.config.execution
    compute = batched_map(
        function,
        {"run": run.variables} if networks is None else networks,
        inputs=MODEL_INPUTS,
        chunk=settings.chunk,
        threads=settings.threads,
    )

    def part(positions: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: a for name, a in compute(render, positions).items() if keep(name)}

    name = cache_key(run.source.fingerprint, run.heads, records.fingerprint, *key)
    return in_parts(context.directory / name, len(records), part, rows=settings.part_records)
