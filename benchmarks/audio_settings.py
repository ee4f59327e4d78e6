"""Settings of spectrogram and level, compared on ESC-10 by inner validation.

    avcl-data esc50 ../shared/data/esc10 --subset esc10 --name esc10 --out data/esc10
    python -m benchmarks.audio_settings --records data/esc10 --noise data/foley/records \\
        --workdir runs/audio_settings

Fold 1 is never used. Each of the folds 2 to 5 is tested with a run of `configs/pretrain.py:esc10`
of half its length on the other three, which also train the probe. Two controls: speed and
direction of stationary noise (records of the demo, `make demo`), which no network can know, and
retrieval of the other view of a file by the mean level of a view alone.
Writes WORKDIR/audio_settings.md: differences to the preset on the same fold, with intervals by
Student's t. Finished runs are not repeated, so the command can be interrupted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import ml_collections
import numpy as np
from etils import epath

from avcl_jax import experiment
from avcl_jax.batched import batched_map
from avcl_jax.configs import evaluate as evaluate_config
from avcl_jax.configs import pretrain as pretrain_config
from avcl_jax.data import rendering
from avcl_jax.data.record_format import is_silent
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.render_spec import RenderSpec
from avcl_jax.data.selection import Selection, UsableRecords
from avcl_jax.data.spectrogram import gather_windows, log_mel
from avcl_jax.evaluation.ablation import FULL, as_table, effects
from avcl_jax.evaluation.evaluate import evaluate
from avcl_jax.evaluation.temporal import noise_control
from avcl_jax.evaluation.views import MODEL_INPUTS, PretrainedRun, fixed_views
from avcl_jax.paths import local_path
from avcl_jax.training import inputs, loop
from benchmarks.measure import command_parser, run_command

FOLDS = (2, 3, 4, 5)
_NATS_PER_DB = np.log(10) / 10

# A waveform int16 and windows of it -> windows in [-1, 1].
Scale = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Variant(NamedTuple):
    """Changes to the preset.

    Attributes:
        settings: settings of the config.
        scale: scaling of the windows of a clip.
        level: keep the mean of each view's log-mel.
        gain_db: largest random gain of a view in training.
    """

    settings: Mapping[str, Any] = {}
    scale: Scale | None = None
    level: bool = True
    gain_db: float = 0.0


def remove_mean(waveform: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Subtracts the mean of the file from windows."""
    return (windows - waveform.mean(dtype=np.float64)).astype(np.float32) / 32768


def equalise_power(waveform: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Removes the mean and scales the file to a mean power of -20 dB of full scale."""
    deviation = max(waveform.std(dtype=np.float64), 1.0)
    return remove_mean(waveform, windows) * np.float32(0.1 * 32768 / deviation)


# A window has clip_seconds / frames, 15.6 ms in the preset.
VARIANTS: Mapping[str, Variant] = {
    FULL: Variant(),
    "window_31_ms": Variant({"spectrogram.frames": 24}),
    "window_31_ms_80_bands": Variant({"spectrogram.frames": 24, "spectrogram.mels": 80}),
    "80_bands": Variant({"spectrogram.mels": 80}),
    "clip_0.5_s": Variant({"views.clip_seconds": 0.5, "spectrogram.frames": 32}),
    "clip_1.0_s": Variant({"views.clip_seconds": 1.0, "spectrogram.frames": 64}),
    "gain_6_db": Variant(gain_db=6.0),
    "gain_12_db": Variant(gain_db=12.0),
    "level_of_views_removed": Variant(level=False),
    "files_of_equal_power": Variant(scale=equalise_power),
    "mean_removed_floor_1e-8": Variant({"spectrogram.floor": 1e-8}, scale=remove_mean),
}
COLUMNS = (
    ("class", "probe.class_from_audio.pretrained", ""),
    ("speed", "temporal.speed_audio.accuracy", ""),
    ("direction", "temporal.direction_audio.accuracy", ""),
    ("order", "temporal.order_aa.accuracy", ""),
    ("R@1 of the other view", "controls.other_view", ""),
    ("the same by level alone", "controls.other_view_by_level", ""),
    ("speed of noise", "controls.speed_audio", ""),
    ("direction of noise", "controls.direction_audio", ""),
)


@contextlib.contextmanager
def rendered_as(variant: Variant) -> Iterator[None]:
    """Applies the changes of a variant that are not in its config, while the context is open."""

    def render_audio(record: Any, clip: Any, spec: RenderSpec) -> tuple[np.ndarray, bool]:
        start = record.audio_start_seconds
        windows = gather_windows(
            record.waveform, clip, spec.log_mel, spec.views, audio_start_seconds=start
        )
        audible = not is_silent(windows)
        scaled = variant.scale(record.waveform, windows) if variant.scale else windows
        spectrogram = log_mel(scaled, spec.log_mel)
        if not variant.level:
            spectrogram = spectrogram - spectrogram.mean()
        return spectrogram, audible

    original = inputs.spectral

    def spectral(key: jax.Array, spectrogram: jax.Array, spec: Any) -> jax.Array:
        changed = original(key, spectrogram, spec)
        gain = jax.random.uniform(jax.random.fold_in(key, 1), changed.shape[:2], minval=-1.0)
        strength = variant.gain_db * _NATS_PER_DB / pretrain_config.demo().spectrogram.std
        return changed + strength * gain[..., None, None]

    with contextlib.ExitStack() as patches:
        if variant.scale or not variant.level:
            patches.enter_context(mock.patch.object(rendering, "render_audio", render_audio))
        if variant.gain_db:
            patches.enter_context(mock.patch.object(inputs, "spectral", spectral))
        yield


def configs_of(
    variant: Variant, records: Path, fold: int, steps: int
) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """Configs of a run and of its evaluation; the number of the fold is also the seed."""
    c = pretrain_config.get_config("esc10")
    c.steps = c.execution.checkpoint_every = steps
    c.bank.warmup_steps = round(c.bank.warmup_steps * steps / 2000)
    c.data.directory = str(records)
    c.data.select = f"fold!=1;fold!={fold}"
    c.seed = fold
    c.update_from_flattened_dict(dict(variant.settings))
    e = evaluate_config.get_config("esc10")
    e.evaluation.train_select, e.evaluation.test_select = c.data.select, f"fold={fold}"
    return c, e


def finds_other_view(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mask [files] of files whose other view alone is nearest, by Euclidean distance.

    Args:
        first: one view of each file [files, channels].
        second: the other views, in the same order.
    """
    distances = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return (distances <= np.diagonal(distances)[:, None]).sum(axis=1) == 1


def other_view_hits(run: PretrainedRun, records: UsableRecords) -> dict[str, np.ndarray]:
    """Masks [files] of first views that find the last, by embedding and by mean log-mel."""
    compute = batched_map(
        run.features, {"run": run.variables}, inputs=MODEL_INPUTS, chunk=16, threads=1
    )

    def render(position: int) -> dict[str, Any]:
        arrays = fixed_views(records, position, run.spec, speeds=(0,), clips=2)
        return arrays | {"level": arrays["spectrogram"].mean(axis=(-2, -1))}

    arrays = compute(render, range(len(records)))
    embeddings = arrays["run/audio_embeddings"].reshape(len(records), 2, -1)
    levels = arrays["level"][..., None]
    return {
        "other_view": finds_other_view(embeddings[:, 0], embeddings[:, 1]),
        "other_view_by_level": finds_other_view(levels[:, 0], levels[:, 1]),
    }


def null_scores(run: PretrainedRun, noise: Path) -> dict[str, float]:
    """Accuracy of a network trained on speed and direction of noise, tested on other noise."""
    section = evaluate_config.get_config("demo").evaluation.null
    train, test = (
        UsableRecords(RecordDataset(noise, split), run.spec)
        for split in (section.train_split, section.test_split)
    )
    control = noise_control(run, section, train, test, threads=1)
    return {name: score.accuracy for name, score in control.scores.items()}


def measure(
    variant: Variant, workdir: Path, records: Path, noise: Path, *, fold: int, steps: int
) -> dict[str, Any]:
    """Trains and tests a variant on one of FOLDS, unless it is finished, and returns its results.

    Args:
        workdir: workdir of this run.
        records: prepared ESC-10.
        noise: records of the demo.
    """
    finished = workdir / "controls.json"
    config, evaluation = configs_of(variant, records, fold, steps)
    if not finished.exists():
        spec = experiment.render_spec(config)
        with rendered_as(variant):
            loop.pretrain(config, epath.Path(workdir))
            evaluate(evaluation, epath.Path(workdir))
            selected = Selection.parse(evaluation.evaluation.test_select)
            tested = UsableRecords(RecordDataset(records, config.data.split), spec, selected)
            run = PretrainedRun.load(epath.Path(workdir))
            hits = other_view_hits(run, tested)
            controls = {name: float(mask.mean()) for name, mask in hits.items()}
            controls |= null_scores(run, noise)
        finished.write_text(json.dumps(controls))
    results = json.loads((workdir / "results.json").read_text())
    return results | {"controls": json.loads(finished.read_text())}


def main(arguments: list[str]) -> None:
    """Runs the command."""
    parser = command_parser("audio_settings", __doc__, json=False)
    parser.add_argument("--records", type=local_path, default="data/esc10", help="prepared ESC-10")
    parser.add_argument(
        "--noise", type=local_path, default="data/foley/records", help="records of the demo"
    )
    parser.add_argument(
        "--workdir", type=local_path, default="runs/audio_settings", help="directory of all runs"
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run")
    parser.add_argument("--folds", type=int, nargs="+", choices=FOLDS, default=FOLDS)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args(arguments)
    for path in (args.records, args.noise):
        if not (path / "dataset_info.json").exists():
            parser.error(f"{path} does not exist: see the first lines of this module")
    names = [name for name in VARIANTS if name in {FULL, *args.only}]
    results = {
        (name, fold): measure(
            VARIANTS[name],
            args.workdir / name / f"fold{fold}",
            args.records,
            args.noise,
            fold=fold,
            steps=args.steps,
        )
        for fold in args.folds
        for name in names
    }
    table = as_table(effects(results, COLUMNS, names, args.folds), names)
    (args.workdir / "audio_settings.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    run_command(main)
