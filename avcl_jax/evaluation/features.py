"""Features of selected records: clips at fixed times, encoded and pooled, and classical statistics.

Every selected record counts, however short it is: see `data.clips`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from etils import epath

from avcl_jax.batched import batched_map, cache_key, in_parts, render_all
from avcl_jax.data.clips import AudioClipSpec, ClipRecords, ClipSpec, VideoClipSpec
from avcl_jax.data.preprocessing import VideoPreprocessing
from avcl_jax.data.render_spec import CropSpec
from avcl_jax.data.spectrogram import log_mel
from avcl_jax.data.views import ViewSpec
from avcl_jax.errors import UserError
from avcl_jax.export import Encoder
from avcl_jax.export.runs import EncoderSource


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Clips of a record, and pooling of an encoder's outputs for them.

    Attributes:
        speeds: playback speeds; one that is too fast for a record is replaced by the fastest of
            these that fits it, or by the slowest.
        clips: clips at each speed, uniformly spaced from the first possible start to the last; a
            single one is in the middle.
        clip_pooling: "mean" is the encoder's own average over time and space; "mean_max" mean and
            maximum over time of the average over space (of a spectrogram: over bands),
            concatenated; "bands_mean_max" the same for every band of a spectrogram by itself.
        record_pooling: "clips" keeps a feature of each clip, "mean" and "mean_max" pool over the
            clips of a record.
        chunk: records encoded at a time, over all devices of a host.
        part_records: records per part of the cache.
        threads: records rendered at a time.
    """

    speeds: tuple[int, ...]
    clips: int
    clip_pooling: str
    record_pooling: str
    chunk: int
    part_records: int
    threads: int

    def __post_init__(self) -> None:
        """Refuses values without a meaning."""
        if not self.speeds or self.clips < 1 or any(s < 1 or s != int(s) for s in self.speeds):
            raise UserError(
                f"features.speeds {self.speeds} must be whole numbers of at least 1, and "
                f"features.clips {self.clips} at least 1"
            )
        for name, known in (
            ("clip_pooling", ("mean", "mean_max", "bands_mean_max")),
            ("record_pooling", ("clips", "mean", "mean_max")),
        ):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"features.{name} {value!r} must be one of {', '.join(known)}")


def encoder_clips(encoder: Encoder, spec: FeatureSpec) -> ClipSpec:
    """Returns the clips that an encoder was trained on, at the speeds of `spec`."""
    preprocess = encoder.preprocess
    if isinstance(preprocess, VideoPreprocessing):
        return VideoClipSpec(
            ViewSpec(preprocess.num_frames, preprocess.clip_seconds, spec.speeds, "shared"),
            CropSpec(preprocess.image_size, min_area=1.0, flip=False, quarter_turns=False),
        )
    return AudioClipSpec(preprocess.log_mel, spec.speeds)


def rendered_clips(records: ClipRecords, position: int, count: int) -> np.ndarray:
    """Renders the clips of one record for an encoder, `count` at each speed.

    Returns:
        uint8 [clips, time, size, size, 3], or standardised float32 [clips, frames, mels].
    """
    clips = records.fixed(position, clips=count)
    spec = records.spec
    return log_mel(clips, spec.log_mel) if isinstance(spec, AudioClipSpec) else clips


def record_features(
    networks: Mapping[str, EncoderSource],
    sides: Sequence[ClipRecords],
    spec: FeatureSpec,
    *,
    directory: epath.PathLike,
) -> list[dict[str, np.ndarray]]:
    """Returns features by several encoders; each record is rendered and encoded once.

    Args:
        networks: encoders of one architecture and preprocessing, by name.
        sides: selected records, for instance those of training and test of several splits.
        directory: `Context.directory`, whose existing parts are reused.

    Returns:
        For each side, by network, float32 [records, C], or [records, clips, C] with record_pooling
        "clips"; in process 0 only, elsewhere empty.

    Raises:
        UserError: if a feature is not finite, or pooling and modality do not fit.
    """
    modality = sides[0].spec.modality
    encoders = {name: network.require(modality) for name, network in networks.items()}
    pool = _pooling(next(iter(encoders.values())), spec.clip_pooling)

    def features(params: Any, arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        batch = arrays["clips"]
        flat = batch.reshape(-1, *batch.shape[2:])
        by_clip = pool(params, flat).reshape(*batch.shape[:2], -1)
        if spec.record_pooling == "clips":
            return {"features": by_clip}
        pooled = [by_clip.mean(axis=1)]
        if spec.record_pooling == "mean_max":
            pooled.append(by_clip.max(axis=1))
        return {"features": jnp.concatenate(pooled, axis=-1)}

    encode = batched_map(
        features,
        {name: dict(encoder.params) for name, encoder in encoders.items()},
        inputs=("clips",),
        chunk=spec.chunk,
        threads=spec.threads,
    )

    def compute(clips: ClipRecords, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        return encode(lambda row: {"clips": rendered_clips(clips, row, spec.clips)}, rows)

    identity = (
        {name: network.fingerprint for name, network in networks.items()},
        dataclasses.asdict(sides[0].spec),
        (spec.clips, spec.clip_pooling, spec.record_pooling),
    )
    by_side = _by_side(compute, sides, spec, directory, *identity)
    found = [{n.removesuffix("/features"): a for n, a in side.items()} for side in by_side]
    for side, arrays in zip(sides, found, strict=True):
        for values in arrays.values():
            broken = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if broken.any():
                raise UserError(
                    f"{int(broken.sum())} records have features that are not finite, first "
                    f"{side.record_ids[int(broken.argmax())]!r}"
                )
    return found


def _by_side(
    compute: Callable[[ClipRecords, Sequence[int]], Mapping[str, np.ndarray]],
    sides: Sequence[ClipRecords],
    spec: FeatureSpec,
    directory: epath.PathLike,
    *identity: Any,
) -> list[dict[str, np.ndarray]]:
    """Computes arrays of the records of all sides of a data set, and returns the rows of each."""
    of_data_set: dict[str, list[ClipRecords]] = {}
    for side in sides:
        of_data_set.setdefault(side.records.fingerprint, []).append(side)
    rows: dict[int, dict[str, np.ndarray]] = {}
    for fingerprint, (first, *others) in of_data_set.items():
        together = first.joined(others)
        digest = hashlib.sha256(together.indices.tobytes()).hexdigest()
        arrays = in_parts(
            epath.Path(directory) / cache_key(*identity, fingerprint, digest),
            len(together),
            functools.partial(compute, together),
            rows=spec.part_records,
        )
        for side in (first, *others):
            places = np.searchsorted(together.indices, side.indices)
            whole = len(side) == len(together)  # without a copy of gigabytes
            rows[id(side)] = {n: a if whole else a[places] for n, a in arrays.items()}
    return [rows[id(side)] for side in sides]


def _pooling(encoder: Encoder, kind: str) -> Callable[[Any, jax.Array], jax.Array]:
    if kind == "mean":
        return encoder.apply
    if kind == "bands_mean_max" and encoder.modality != "audio":
        raise UserError("features.clip_pooling 'bands_mean_max' is for audio: use 'mean_max'")

    def pooled(params: Any, batch: jax.Array) -> jax.Array:
        maps = encoder.apply(params, batch, pooled=False)
        if kind == "mean_max":
            over_time = maps.mean(axis=tuple(range(2, maps.ndim - 1)))
        else:
            over_time = maps.reshape(*maps.shape[:2], -1)
        return jnp.concatenate([over_time.mean(axis=1), over_time.max(axis=1)], axis=-1)

    return pooled


def classical_features(waveform: np.ndarray, sample_rate_hz: int) -> Mapping[str, np.ndarray]:
    """Returns features of whole audio from before neural networks: a baseline of encoders.

    Definitions are librosa's defaults: windows of 2,048 samples every 512, 128 mel bands in
    decibels, 20 MFCCs.

    Returns:
        "mfcc" float32 [80] and "log_mel" [512] of int16 [samples]: mean, standard deviation,
        minimum and maximum over time of each coefficient and band.
    """
    samples = librosa.util.buf_to_float(waveform, n_bytes=2)
    power = librosa.feature.melspectrogram(y=samples, sr=sample_rate_hz)
    decibels = librosa.power_to_db(power)
    # Minimum and maximum too: on ESC-10 they are worth 3 points to the log-mel baseline.
    statistics = (np.mean, np.std, np.min, np.max)
    return {
        name: np.concatenate([of(values, axis=1) for of in statistics]).astype(np.float32)
        for name, values in (("mfcc", librosa.feature.mfcc(S=decibels)), ("log_mel", decibels))
    }


def classical_record_features(
    sides: Sequence[ClipRecords], spec: FeatureSpec, *, directory: epath.PathLike
) -> list[dict[str, np.ndarray]]:
    """Returns `classical_features` of the records of each side, [records, C] of each; in process 0.

    Takes the arguments of `record_features`.
    """

    def compute(clips: ClipRecords, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        def features(row: int) -> Mapping[str, np.ndarray]:
            record = clips[row]
            return classical_features(record.waveform, record.sample_rate_hz)

        return render_all(features, rows, threads=spec.threads)

    return _by_side(compute, sides, spec, directory, "classical")
