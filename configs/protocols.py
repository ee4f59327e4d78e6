"""What the configs of all protocols share. No task of its own."""

from __future__ import annotations

import ml_collections


def base(task: str, name: str) -> ml_collections.ConfigDict:
    """A config with the settings that every protocol reads.

    Args:
        task: of `avcl_jax.main`.
        name: of the run; results are written to runs/NAME where no --workdir is given.
    """
    c = ml_collections.ConfigDict()
    c.task = task
    c.name = name
    c.seed = 0
    # What is evaluated: workdir of a run, directory of its export, or of imported weights.
    c.encoder = "runs/demo"
    c.compilation_cache = "~/.cache/avcl_jax/xla"

    c.data = ml_collections.ConfigDict()
    c.data.make_demo = False  # make and prepare the foley media if `directory` does not exist
    c.data.directory = ""
    c.data.threads = 2  # records rendered at a time
    c.data.allow_trained_on = False  # test on records that the encoder met in pretraining
    c.data.leave_out = False  # go on without records that lack class or modality, and say how many

    c.bootstrap = ml_collections.ConfigDict()
    c.bootstrap.resamples = 1000
    return c


def linear_probe() -> ml_collections.ConfigDict:
    """Settings of the linear probe, `evaluation.linear.fit_probe`."""
    p = ml_collections.ConfigDict()
    p.classifier = "logistic"  # or "svm": a linear support vector machine
    p.costs = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # candidates for C
    p.folds = 5  # of the training sources, by which C is chosen
    p.iterations = 500
    p.tolerance = 1e-5
    return p


def demo_data(c: ml_collections.ConfigDict) -> None:
    """Points a config to the embedded demo data, which are made if they are not there."""
    c.data.make_demo = True
    c.data.directory = "data/foley/records"


def features(
    *, speeds: tuple[int, ...], clips: int, clip_pooling: str, record_pooling: str, chunk: int
) -> ml_collections.ConfigDict:
    """The section `features`: which clips of a record, and what is made of them.

    Args:
        speeds: of playback.
        clips: at each speed, uniformly spaced.
        clip_pooling: of an encoder's output: see `evaluation.features.FeatureSpec`.
        record_pooling: of the clips of a record: "mean", "mean_max", or "clips" for none.
        chunk: records encoded at a time, over all devices of a host.
    """
    f = ml_collections.ConfigDict()
    f.speeds = speeds
    f.clips = clips
    f.clip_pooling = clip_pooling
    f.record_pooling = record_pooling
    f.chunk = chunk
    f.part_records = 1024  # in a file of WORKDIR/features, from which an interrupted run goes on
    return f
