"""Encoders in and out: as files, by the path of a run or an export, from and to PyTorch's names.

    python -m avcl_jax.main --config=configs/export.py --workdir=runs/demo

    encoder = load_encoder("runs/demo/export/video")
    features = encoder(frames, fps)          # uint8 [T, H, W, 3] of any size, length and rate

Preprocessing calls the functions of the training pipeline. Records are smaller than the files that
they were made of and coded as JPEG, so features of both differ a little: see docs/encoders.md.
"""

from avcl_jax.export.encoder import Encoder, ExportError, export_encoder, load_encoder

__all__ = ["Encoder", "ExportError", "export_encoder", "load_encoder"]
