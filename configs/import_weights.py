"""Import of weights that published PyTorch code trained.

    python -m avcl_jax.main --config=configs/import_weights.py:torchvision,r2plus1d_18 \\
        --config.checkpoint=r2plus1d_18-91a641e6.pth --workdir=runs/r2plus1d_18

The preset is a code base and one of its encoders: docs/encoders.md lists them. Writes
WORKDIR/export/video or WORKDIR/export/audio, which `avcl_jax.export.load_encoder` reads. Settings
that importing does not touch are those of configs/pretrain.py:kinetics400.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from avcl_jax.errors import UserError
from avcl_jax.export.torch_names import CODE_BASES
from avcl_jax.models import encoders
from configs import pretrain

_IMAGENET = {"channel_mean": (0.485, 0.456, 0.406), "channel_std": (0.229, 0.224, 0.225)}
_KINETICS = {
    "channel_mean": (0.43216, 0.394666, 0.37645),
    "channel_std": (0.22803, 0.22145, 0.216989),
}
_GRAY = {"channel_mean": (0.45, 0.45, 0.45), "channel_std": (0.225, 0.225, 0.225)}


def get_config(preset: str = "torchvision,r2plus1d_18") -> ml_collections.ConfigDict:
    """The config of `CODE_BASE,ENCODER`, with the input that its weights were trained on."""
    code_base, _, name = preset.partition(",")
    if code_base not in CODE_BASES or name not in CODE_BASES[code_base].tables:
        known = [f"{base},{n}" for base, names in CODE_BASES.items() for n in names.tables]
        raise UserError(f"unknown preset {preset!r}: use one of {' '.join(known)}")
    c = pretrain.get_config("kinetics400")
    with c.unlocked():
        c.task = "import_weights"
        c.name = f"{code_base}_{name}"
        c.code_base = code_base
        c.checkpoint = ""
        c.model.dtype = "float32"
        # Pixels reach the encoder in [0, 1]; it standardises each colour itself.
        c.pixels.mean = 0.0
        c.pixels.std = 1.0
        if name in encoders.VIDEO:
            c.modalities = "video"
            _video(c, code_base, name)
        else:
            c.modalities = "audio"
            c.model.audio.name = name
    return c


def _video(c: ml_collections.ConfigDict, code_base: str, name: str) -> None:
    section: dict[str, Any] = {"name": name}
    c.spectrogram.frames = 1  # no sound is read, but a clip must have whole windows
    if code_base == "torchvision":  # torchvision.transforms._presets.VideoClassification, 15 fps
        section |= _KINETICS
        c.views.num_frames, c.views.clip_seconds = 16, 16 / 15
        c.spectrogram.sample_rate_hz = 24_000  # 25,600 samples in this interval
        c.crop.image_size = 224 if name == "s3d" else 112
    elif code_base == "avid":  # its configs/main/avid/kinetics/Cross-N1024.yaml
        section |= _IMAGENET
        c.views.num_frames, c.views.clip_seconds = 8, 0.5
        c.crop.image_size = 224
    else:  # GDT's README and datasets/GDTPretrainDataset.py
        section |= _GRAY
        c.views.num_frames, c.views.clip_seconds = 30, 1.0
        c.crop.image_size = 112
    c.model.video.update(section)
