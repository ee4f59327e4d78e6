"""The README's example runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from avcl_jax import experiment
from avcl_jax.data.preprocessing import AudioPreprocessing, VideoPreprocessing
from avcl_jax.export import export_encoder
from configs import pretrain

ROOT = Path(__file__).resolve().parent.parent


def test_the_example_of_the_readme_runs(tmp_path):
    config = pretrain.get_config()
    spec = experiment.render_spec(config)
    size, frames = spec.crop.image_size, spec.views.num_frames
    encoders = {
        "video": (
            experiment.video_encoder(config),
            jnp.zeros((1, frames, size, size, 3)),
            VideoPreprocessing(
                num_frames=frames,
                clip_seconds=spec.views.clip_seconds,
                image_size=size,
                mean=config.pixels.mean,
                std=config.pixels.std,
            ),
        ),
        "audio": (
            experiment.audio_encoder(config),
            jnp.zeros((1, spec.log_mel.frames, spec.log_mel.mels)),
            AudioPreprocessing(spec.log_mel),
        ),
    }
    for modality, (encoder, example, preprocessing) in encoders.items():
        export_encoder(
            tmp_path / "runs" / "demo" / "export" / modality,
            encoder=encoder,
            params=jax.jit(encoder.init, static_argnames="train")(
                jax.random.key(0), example, train=False
            ),
            preprocessing=preprocessing,
            source={},
        )
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"({config.model.video.widths[-1]},) ({128},)"
