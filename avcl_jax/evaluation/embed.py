"""Views of every record of a split, rendered as in training, and what a network makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from avcl_jax.data.crop import center_crop, random_crop
from avcl_jax.data.rendering import RenderSpec, describe, render_views
from avcl_jax.data.usable_records import UsableRecords
from avcl_jax.data.views import Clip, draw_views, feasible_speeds
from avcl_jax.errors import UserError
from avcl_jax.evaluation.record_features import padded, rendered_ahead
from avcl_jax.training import sharding
from avcl_jax.training.inputs import prepare_inputs

# What the network looks at; everything else of a rendered record travels with its outputs.
INPUTS = ("video", "spectrogram", "audio_windows")
MODALITY_INPUTS = {"video": "video", "audio": "spectrogram"}
_MODEL_INPUTS = ("video", "spectrogram", "has_video", "has_audio")

Render = Callable[[int], dict[str, Any]]


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
    """Renders views of one record at random times and crops, speeds and directions in turn.

    The combinations of speed and direction take turns, so that `views` divisible by their number
    gives each equally often: labels are balanced exactly, record by record.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.
        speeds: indices into `spec.views.speeds`; those too fast for the record are left out.
        directions: of `FORWARD`, `BACKWARD`.
        views: how many.
        seed: of the draw; the same for the same position whatever the order of rendering.
        modalities: what is rendered; the input of the other one is left out.

    Returns:
        As `render_views` and `describe`, with `views` views.
    """
    index, record, use = source[position]
    use = dataclasses.replace(
        use,
        has_video=use.has_video and "video" in modalities,
        has_audio=use.has_audio and "audio" in modalities,
    )
    rng = np.random.default_rng(np.random.SeedSequence([seed, position]))
    feasible = feasible_speeds(use.timeline, spec.views)
    usable = [speed for speed in speeds if speed in feasible] or feasible[:1]
    combinations = [(speed, direction) for speed in usable for direction in directions]
    clips = []
    for number in range(views):
        speed, direction = combinations[number % len(combinations)]
        span = spec.views.clip_seconds * spec.views.speeds[speed]
        slack = max(use.timeline.duration_seconds - span, 0.0)
        start = use.timeline.start_seconds + slack * rng.uniform()
        clips.append(Clip(float(start), speed, direction))
    height, width = max(record.height, 1), max(record.width, 1)
    crops = [random_crop(rng, height, width, spec.crop) for _ in clips]
    arrays = render_views(record, use, clips, clips, crops, spec)
    # Views of a record are averaged, so that it has audio even if some of them are silent.
    arrays["has_audio"] = np.bool_(use.has_audio)
    unwanted = [name for modality, name in MODALITY_INPUTS.items() if modality not in modalities]
    rendered = {name: value for name, value in arrays.items() if name not in unwanted}
    return rendered | describe(index, record, source.records)


def drawn_pairs(
    source: UsableRecords, position: int, spec: RenderSpec, *, pairs: int, seed: int
) -> dict[str, Any]:
    """Renders pairs of views of one record, drawn as in training but cropped in the centre.

    Picture and sound of a view are of one playback also where `spec` has an independent audio
    transform: two runs are shown the same views. With a transform of their own, intervals that do
    not overlap lie further apart, and order is easier to tell.

    Args:
        source: usable records.
        position: which one.
        spec: rendering.
        pairs: how many.
        seed: of the draw; the same for the same position whatever the order of rendering.

    Returns:
        The arrays of a training batch with `pairs` rows, all of this record.
    """
    index, record, use = source[position]
    rng = np.random.default_rng(np.random.SeedSequence([seed, position]))
    views = dataclasses.replace(spec.views, audio_transform="shared")
    crop = center_crop(max(record.height, 1), max(record.width, 1))
    rows = []
    for _ in range(pairs):
        pair = draw_views(rng, use.timeline, views, use.frame_seconds(record))
        arrays = render_views(record, use, pair.video, pair.audio, [crop] * 2, spec)
        arrays |= {
            "order": np.int32(pair.order),
            "speed_mask": np.bool_(pair.speed_mask),
            "direction_mask": np.bool_(pair.direction_mask),
            "order_mask": np.bool_(pair.order_mask),
        }
        rows.append(arrays | describe(index, record, source.records))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def render_all(render: Render, count: int, *, threads: int) -> dict[str, np.ndarray]:
    """Renders records 0 … count − 1 and stacks them, inputs included: `[count, views, …]`.

    For splits small enough to train on from memory; `encode_all` keeps no inputs.
    """
    with ThreadPoolExecutor(threads) as pool:
        return _stack(list(pool.map(render, range(count))))


def encode_all(
    render: Render,
    count: int,
    compute: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]],
    *,
    chunk: int,
    threads: int,
    describe_inputs: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
) -> dict[str, np.ndarray]:
    """Renders records 0 … count − 1 and runs a jitted function over them, a chunk at a time.

    The next chunks are rendered while the devices compute. The last chunk is filled up with
    repetitions of its last record, which are then cut off: every call has one shape and `compute`
    is compiled once.

    Args:
        render: arrays of one record, from its position.
        count: number of records.
        compute: maps stacked arrays [chunk, …] to outputs [chunk, …].
        chunk: records in a call; rounded up to a multiple of the devices of this host.
        threads: records rendered at a time.
        describe_inputs: maps the arrays of one record to further outputs, on the host.

    Returns:
        Outputs [count, …], and all rendered arrays but the network's inputs.
    """

    chunk = -(-chunk // jax.local_device_count()) * jax.local_device_count()

    def prepare(position: int) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
        arrays = render(position)
        return arrays, describe_inputs(arrays) if describe_inputs is not None else {}

    collected: list[dict[str, np.ndarray]] = []
    for rows in rendered_ahead(prepare, range(count), chunk=chunk, threads=threads):
        rendered, described = zip(*rows, strict=True)
        batch = _stack(padded(rendered, chunk))
        outputs = {name: np.asarray(value)[: len(rows)] for name, value in compute(batch).items()}
        outputs |= {name: a[: len(rows)] for name, a in batch.items() if name not in INPUTS}
        collected.append(outputs | _stack(described))
    return {name: np.concatenate([part[name] for part in collected]) for name in collected[0]}


def feature_function(
    model: nn.Module,
    networks: Mapping[str, Any],
    spec: RenderSpec,
    *,
    pixel_mean: float,
    pixel_std: float,
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns what gives the features and embeddings of several networks of one shape.

    Args:
        model: `AudioVisualModel`.
        networks: name to variables, for instance random and pretrained ones.
        spec: rendering, with the spectrogram made on the host.
        pixel_mean: subtracted from pixels in [0, 1].
        pixel_std: pixels are divided by it.

    Returns:
        A function from stacked arrays of `fixed_views` to float32 [videos, channels]
        arrays named NETWORK/video_features, NETWORK/audio_features, NETWORK/video_embeddings and
        NETWORK/audio_embeddings. Features are means over the views. Embeddings of all views stand
        one after another, so that the cosine of two videos is the mean similarity of their views
        of the same times: when something happens belongs to what a picture and its sound share,
        and a mean over views would forget it.
    """

    @jax.jit
    def features(variables: Any, arrays: Any) -> dict[str, jax.Array]:
        inputs: Any = prepare_inputs(
            as_pairs(arrays),
            spec,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            augmentation=None,
            key=None,
        )
        outputs: Any = model.apply(variables, **inputs, train=False)
        videos = arrays["has_video"].shape[0]
        described = {}
        for name, value in outputs.items():
            by_view = value.reshape(videos, -1, value.shape[-1])
            if name.endswith("_features"):
                described[name] = by_view.mean(axis=1)
            elif name.endswith("_embeddings"):
                described[name] = by_view.reshape(videos, -1)
        return described

    place, placed = _over_devices(networks)

    def compute(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        inputs = place(arrays)
        return {
            f"{network}/{name}": value
            for network, variables in placed.items()
            for name, value in features(variables, inputs).items()
        }

    return compute


def logit_function(
    model: nn.Module, variables: Any, spec: RenderSpec, *, pixel_mean: float, pixel_std: float
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns what gives the logits of all temporal tasks for stacked `drawn_pairs`.

    The arrays of the result are [videos, pairs, …], named as the outputs of the joint model.
    """

    @jax.jit
    def logits(variables: Any, arrays: Any) -> dict[str, jax.Array]:
        videos, pairs = arrays["has_video"].shape
        flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in arrays.items()}
        inputs: Any = prepare_inputs(
            flat,
            spec,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            augmentation=None,
            key=None,
        )
        outputs: Any = model.apply(variables, **inputs, train=False)
        return {
            name: value.reshape(videos, pairs, *value.shape[1:])
            for name, value in outputs.items()
            if not name.endswith(("_features", "_embeddings"))
        }

    place, placed = _over_devices(variables)

    def compute(arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return logits(placed, place(arrays))

    return compute


def _over_devices(variables: Any) -> tuple[Callable[[Mapping[str, np.ndarray]], Any], Any]:
    """Returns a function that splits a batch over the devices of this host, and variables on each.

    The size of a batch must be a multiple of the number of devices, as in `encode_all`.
    """
    mesh = sharding.create_mesh(1, jax.local_devices())
    rows = sharding.rows_sharding(mesh)

    def place(arrays: Mapping[str, np.ndarray]) -> Any:
        return jax.device_put({name: arrays[name] for name in _MODEL_INPUTS}, rows)

    return place, jax.device_put(variables, sharding.replicated(mesh))


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def check_pairs(views: int) -> None:
    """Refuses a number of views that leaves one without a partner in the joint model.

    Raises:
        UserError: if the number is odd.
    """
    if views % 2:
        raise UserError(
            f"{views} views of each video do not form pairs: choose evaluation speeds and "
            "views_per_speed so that their product is even"
        )


def as_pairs(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Regroups `[videos, views, …]` into the pairs `[videos · views / 2, 2, …]` of the joint model.

    Args:
        arrays: `video`, `spectrogram` [videos, views, …] and `has_video`, `has_audio` [videos].

    Raises:
        UserError: if the number of views is odd.
    """
    views = arrays["video"].shape[1]
    check_pairs(views)
    return {
        "video": arrays["video"].reshape(-1, 2, *arrays["video"].shape[2:]),
        "spectrogram": arrays["spectrogram"].reshape(-1, 2, *arrays["spectrogram"].shape[2:]),
        "has_video": arrays["has_video"].repeat(views // 2),
        "has_audio": arrays["has_audio"].repeat(views // 2),
    }
