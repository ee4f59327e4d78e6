"""Features of many records by one encoder: sharded over devices and hosts, kept in the workdir."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from avcl_jax.evaluation.parts import in_parts, key_of
from avcl_jax.evaluation.protocol import ProtocolError
from avcl_jax.evaluation.record_clips import RecordClips
from avcl_jax.export import Encoder
from avcl_jax.training import sharding

ClipPooling = Literal["mean", "mean_max", "bands_mean_max"]
RecordPooling = Literal["clips", "mean", "mean_max"]
Row = TypeVar("Row")
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """How features are made of an encoder's outputs.

    Attributes:
        clip_pooling: "mean" is the encoder's own average over time and space; "mean_max" mean and
            maximum over time of the average over space (of a spectrogram: over bands), one after
            the other; "bands_mean_max" the same for every band of a spectrogram by itself.
        record_pooling: "clips" keeps a feature of each clip, "mean" and "mean_max" pool over the
            clips of a record.
        chunk: records encoded at a time, over all devices of a host.
        threads: records rendered at a time.
        part_records: records in a part of the workdir's cache.
    """

    clip_pooling: ClipPooling
    record_pooling: RecordPooling
    chunk: int
    threads: int
    part_records: int

    def __post_init__(self) -> None:
        """Refuses what has no meaning."""
        for name, known in (
            ("clip_pooling", ("mean", "mean_max", "bands_mean_max")),
            ("record_pooling", ("clips", "mean", "mean_max")),
        ):
            if getattr(self, name) not in known:
                raise ProtocolError(
                    f"features.{name} {getattr(self, name)!r} must be one of {', '.join(known)}"
                )


def record_features(
    encoder: Encoder,
    clips: RecordClips,
    spec: FeatureSpec,
    *,
    fingerprint: str,
    directory: epath.PathLike,
) -> np.ndarray:
    """Returns the features of all records of `clips`; those in `directory` are not computed again.

    Every host computes its parts on its own devices, so hosts need not wait for each other until
    all are done.

    Args:
        encoder: of the modality of `clips`.
        clips: of the selected records.
        spec: how.
        fingerprint: of the encoder's weights.
        directory: where parts are kept: that of the version of a protocol, `ProtocolRun.features`.

    Returns:
        float32 [records, C], or [records, clips, C] with record_pooling "clips"; in process 0 only,
        elsewhere empty.

    Raises:
        ProtocolError: if a feature is not finite, or pooling and modality do not fit.
    """
    compute = _Features(encoder, clips.clips_per_record, spec)
    key = key_of(
        fingerprint,
        encoder.modality,
        clips.fingerprint,
        clips.identity,
        spec.clip_pooling,
        spec.record_pooling,
    )

    def part(positions: Sequence[int]) -> dict[str, np.ndarray]:
        batches = rendered_ahead(
            clips.__getitem__, positions, chunk=compute.rows, threads=spec.threads
        )
        features = np.concatenate(
            [compute(np.stack(padded(rows, compute.rows)))[: len(rows)] for rows in batches]
        )
        if not (finite := np.isfinite(features).reshape(len(features), -1).all(axis=1)).all():
            bad = clips.record_ids[positions[int(np.flatnonzero(~finite)[0])]]
            raise ProtocolError(
                f"{int((~finite).sum())} records have features that are not finite, first {bad!r}"
            )
        return {"features": features}

    arrays = in_parts(epath.Path(directory) / key, len(clips), part, rows=spec.part_records)
    return arrays.get("features", np.empty((0, 0), np.float32))


class _Features:
    """From rendered clips [rows, clips, …] to features, jitted once and sharded over devices."""

    def __init__(self, encoder: Encoder, clips: int, spec: FeatureSpec):
        mesh = sharding.create_mesh(1, jax.local_devices())
        self.rows = -(-spec.chunk // mesh.size) * mesh.size
        self._sharding = sharding.rows_sharding(mesh)
        self._params = jax.device_put(dict(encoder.params), sharding.replicated(mesh))
        pool = _pooling(encoder, spec.clip_pooling)

        @jax.jit
        def features(params: Any, batch: jax.Array) -> jax.Array:
            flat = batch.reshape(-1, *batch.shape[2:])
            by_clip = pool(params, flat).reshape(batch.shape[0], clips, -1)
            if spec.record_pooling == "clips":
                return by_clip
            mean = by_clip.mean(axis=1)
            if spec.record_pooling == "mean":
                return mean
            return jnp.concatenate([mean, by_clip.max(axis=1)], axis=-1)

        self._features = features

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return np.asarray(self._features(self._params, jax.device_put(batch, self._sharding)))


def _pooling(encoder: Encoder, kind: ClipPooling) -> Callable[[Any, jax.Array], jax.Array]:
    if kind == "mean":
        return encoder.apply
    if kind == "bands_mean_max" and encoder.modality != "audio":
        raise ProtocolError("features.clip_pooling 'bands_mean_max' is for sound: use 'mean_max'")

    def pooled(params: Any, batch: jax.Array) -> jax.Array:
        maps = encoder.apply(params, batch, pooled=False)
        if kind == "mean_max":
            over_time = maps.mean(axis=tuple(range(2, maps.ndim - 1)))
        else:
            over_time = maps.reshape(*maps.shape[:2], -1)
        return jnp.concatenate([over_time.mean(axis=1), over_time.max(axis=1)], axis=-1)

    return pooled


def rendered_ahead(
    render: Callable[[int], Row], positions: Sequence[int], *, chunk: int, threads: int
) -> Iterator[list[Row]]:
    """Yields rendered records in order, up to `chunk` at a time.

    Threads render the next records while the device computes.

    Args:
        render: renders the record at a position.
        positions: positions of the records.
        chunk: records in a batch; the last batch may be smaller.
        threads: records rendered at a time.
    """
    with ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[list[Future[Row]]] = collections.deque()
        for start in range(0, len(positions), chunk):
            chosen = positions[start : start + chunk]
            pending.append([pool.submit(render, position) for position in chosen])
            if len(pending) > _BATCHES_AHEAD:
                yield [future.result() for future in pending.popleft()]
        while pending:
            yield [future.result() for future in pending.popleft()]


def padded(rows: Sequence[Row], chunk: int) -> list[Row]:
    """Pads a batch with repetitions of its last row, so that only one shape is compiled."""
    return [*rows, *[rows[-1]] * (chunk - len(rows))]
