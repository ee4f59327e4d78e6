"""Export of the encoders of a pretrained run.

    python -m avcl_jax.main --config=configs/export.py --workdir=RUN

Everything is read from RUN/config.json. Writes RUN/export/video and RUN/export/audio, which
`avcl_jax.export.load_encoder` reads.
"""

from ml_collections import ConfigDict

from configs.common import execution


def get_config() -> ConfigDict:
    """Returns the task, whose settings are those of the run."""
    c = ConfigDict(dict(task="avcl_jax.export.runs:export_run", execution=execution()))
    c.name = "demo"  # the run under runs/ that is exported where no --workdir is given
    return c.lock()
