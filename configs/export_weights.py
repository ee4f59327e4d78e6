"""Weights of an exported encoder under the names of PyTorch code.

    python -m avcl_jax.main --config=configs/export_weights.py \\
        --config.encoder=runs/kinetics400/export/video --workdir=runs/kinetics400

Writes WORKDIR/torchvision.safetensors, for `load_state_dict` of the network of the same name.
"""

from ml_collections import ConfigDict

from configs.common import execution


def get_config() -> ConfigDict:
    """Returns the encoder to export and the code whose names it gets."""
    c = ConfigDict(dict(task="avcl_jax.export.torch_weights:export_weights", name="weights"))
    c.encoder = "runs/kinetics400/export/video"  # written by configs/export.py
    c.code_base = "torchvision"  # or "avid", "gdt"
    c.execution = execution()
    return c.lock()
