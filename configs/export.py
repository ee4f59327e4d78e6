"""Export of the encoders of a pretrained run.

    python -m avcl_jax.main --config=configs/export.py --workdir=RUN

Everything is read from RUN/config.json. Writes RUN/export/video and RUN/export/audio, which
`avcl_jax.export.load_encoder` reads.
"""

from ml_collections import ConfigDict

from configs.common import execution


def get_config() -> ConfigDict:
    """Returns the task, whose settings are those of the run; without --workdir, of runs/demo."""
    task = "avcl_jax.export.runs:export_run"
    return ConfigDict(dict(task=task, name="demo", execution=execution())).lock()
