"""Export of the encoders of a run, or of one encoder's weights under the names of PyTorch code.

    python -m avcl_jax.main --config=configs/export.py --workdir=RUN
    python -m avcl_jax.main --config=configs/export.py:torchvision \\
        --config.encoder=runs/kinetics400/export/video --workdir=runs/kinetics400

The first reads RUN/config.json, and writes RUN/export/video and RUN/export/audio, which
`avcl_jax.export.load_encoder` reads, and their model card, RUN/export/README.md. The second writes
WORKDIR/torchvision.safetensors, for `load_state_dict` of the network of the same name.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import execution


def get_config(preset: str = "run") -> ConfigDict:
    """Returns a preset: run, or the code base whose names weights get.

    Without --workdir, `run` exports runs/demo; all its other settings are those of the run.
    """
    datasets.check_preset(preset, ("run", "torchvision", "avid", "gdt"))
    c = ConfigDict(dict(task="avcl_jax.export.runs:export_run", name="demo"))
    if preset == "run":
        # Of the weights, as the Hugging Face Hub names licences: "apache-2.0", "cc-by-4.0", …
        c.license = "unknown"
    else:
        c.update(task="avcl_jax.export.torch_weights:export_weights", name="weights")
        c.update(encoder="runs/kinetics400/export/video", code_base=preset)
    c.execution = execution()
    return c.lock()
