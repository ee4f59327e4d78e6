"""Linear probe of a frozen encoder: a linear classifier of its features, video or audio.

    python -m avcl_jax.main --config=configs/linear_probe.py --config.encoder=runs/demo
    python -m avcl_jax.main --config=configs/linear_probe.py:records --config.encoder=runs/mine \\
        --config.data.directory=data/mine --config.data.label=LABEL --workdir=runs/mine_linear

`encoder` is the workdir of a pretraining run, an export, or imported weights. docs/protocols.md
defines the protocol; it is the probe of configs/evaluate.py, and gives the same accuracy for the
same records. esc10 was run whole, too. Host memory: features of the trained and the random encoder,
and of one again twice over the devices: 0.4 GB each for VGG-Sound at 512 channels, AudioSet 4 GB.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import linear_probe, protocol


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns the probe of a data set of configs/datasets.py.

    For the 20,000 balanced training clips of AudioSet alone, prepare them apart and set
    `--config.data.train_split=balanced_train`. For one pretraining run per fold of ESC, each with
    data.select="fold!=...", set `--config.encoder='runs/esc10/fold{fold}'`.
    """
    c = protocol("avcl_jax.evaluation.classification:run_linear_probe", f"{preset}_linear_probe")
    c.data = datasets.labelled(preset)
    c.data.group_label = datasets.find(preset).groups
    c.modality = datasets.find(preset).modality
    # Clips at each speed, spread over the record: `evaluation.features.FeatureSpec`.
    small = preset in ("demo", "demo_audio", "records")
    c.features = dict(speeds=(1, 2, 4) if small else (1, 2), clips=4 if small else 5)
    c.features.update(clip_pooling="mean", record_pooling="mean")
    c.probe = linear_probe()
    c.probe.classifier = "logistic"  # or "svm": a linear support vector machine
    c.baselines = dict(random=True)  # an encoder of the same shape that was never trained
    c.baselines.classical = False  # statistics of MFCC and of the log-mel spectrum of whole audio
    c.baselines.classical_costs = (0.1, 1.0, 10.0, 100.0)
    c.baselines.classical_linear_costs = (1e-3, 1e-2, 1e-1)
    c.execution.update(threads=2 if small else 16, chunk=32)
    if preset == "audioset":
        c.bootstrap.resamples = 100  # each sorts the scores of 527 classes
    if preset in ("esc10", "esc50"):  # a support vector machine, as is usual for ESC
        c.features.update(speeds=(1,), clips=10, clip_pooling="mean_max", record_pooling="mean_max")
        c.probe.classifier = "svm"
        # Larger ones take most of the time and were never chosen: files are fewer than channels.
        c.probe.costs = (1e-4, 1e-3, 1e-2, 1e-1)
        c.baselines.classical = True
        c.execution.update(threads=2, chunk=16)
    return c.lock()
