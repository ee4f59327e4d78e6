"""Audio classification by frozen features, from config to results.json and report.html.

python -m avcl_jax.main --config=configs/audio_classification.py:esc10 --config.encoder=RUN
"""

from __future__ import annotations

from typing import Any

import ml_collections
from etils import epath

from avcl_jax.evaluation.audio_folds import run_folds
from avcl_jax.evaluation.audio_probe import run_linear_probe, run_multilabel_probe
from avcl_jax.evaluation.protocol import ProtocolError

_METHODS = {
    "folds": run_folds,
    "linear_probe": run_linear_probe,
    "multilabel_probe": run_multilabel_probe,
}


def audio_classification(
    config: ml_collections.ConfigDict, workdir: epath.PathLike
) -> dict[str, Any]:
    """Classifies sounds as `config.evaluation.method` says and writes the results to `workdir`.

    Args:
        config: as `configs/audio_classification.py` returns it.
        workdir: of the results, local or gs://.

    Returns:
        The contents of results.json; empty in processes other than the first.

    Raises:
        ProtocolError: if the method is unknown, or data and protocol do not fit.
    """
    method = config.evaluation.method
    if method not in _METHODS:
        raise ProtocolError(f"evaluation.method {method!r} must be one of {', '.join(_METHODS)}")
    return _METHODS[method](config, epath.Path(workdir))
