"""Import of weights that published PyTorch code trained.

    python -m avcl_jax.main --config=configs/import_weights.py:torchvision,r2plus1d_18 \\
        --config.checkpoint=r2plus1d_18-91a641e6.pth --workdir=runs/r2plus1d_18

The preset is a code base and one of its encoders (docs/encoders.md). Writes WORKDIR/export/video or
WORKDIR/export/audio, which `avcl_jax.export.load_encoder` reads. Settings of the input that
importing does not touch are those of configs/pretrain.py:kinetics400.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets, pretrain
from avcl_jax.export.torch_names import CODE_BASES
from avcl_jax.models import encoders

# Frames and seconds of a clip, image size, and mean and standard deviation of each colour.
_VIDEO_INPUT = {
    # torchvision.transforms._presets.VideoClassification, 15 fps
    "torchvision": (16, 16 / 15, 112, (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
    # its configs/main/avid/kinetics/Cross-N1024.yaml
    "avid": (8, 0.5, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # its README and datasets/GDTPretrainDataset.py
    "gdt": (30, 1.0, 112, (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)),
}


def get_config(preset: str = "torchvision,r2plus1d_18") -> ConfigDict:
    """Returns the import of `CODE_BASE,ENCODER`, with the input of its training."""
    known = [f"{base},{n}" for base, names in CODE_BASES.items() for n in names.tables]
    datasets.check_preset(preset, known)
    code_base, name = preset.split(",")
    full = pretrain.kinetics400()
    c = ConfigDict(dict(task="avcl_jax.export.torch_weights:import_weights", checkpoint=""))
    c.update(name=f"{code_base}_{name}", code_base=code_base)
    for section in ("views", "crop", "spectrogram", "model", "execution"):
        c[section] = full[section]
    c.model.dtype = "float32"
    # Pixels reach the encoder in [0, 1]; it standardises each colour itself.
    c.pixels = dict(mean=0.0, std=1.0)
    c.modalities = "video" if name in encoders.VIDEO else "audio"
    c.model[c.modalities].name = name
    if c.modalities == "video":
        frames, seconds, size, mean, std = _VIDEO_INPUT[code_base]
        c.views.update(num_frames=frames, clip_seconds=seconds)
        c.crop.image_size = 224 if name == "s3d" else size
        c.model.video.update(channel_mean=mean, channel_std=std)
        c.spectrogram.frames = 1  # audio is not read, but a clip must have whole windows
        if code_base == "torchvision":
            c.spectrogram.sample_rate_hz = 24_000  # 25,600 samples in 16 / 15 s
    return c.lock()
