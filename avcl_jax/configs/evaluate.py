"""Evaluation of a pretrained run: retrieval, temporal tasks, and where there are labels, probes.

    python -m avcl_jax.main --config=configs/evaluate.py --workdir=RUN
    python -m avcl_jax.main --config=configs/evaluate.py:vggsound --workdir=gs://bucket/vggsound

Model, views and records are read from RUN/config.json; this file has only settings of evaluation.
Writes RUN/results.json and RUN/report.html.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import execution, linear_probe


def get_config(preset: str = "run") -> ConfigDict:
    """Returns a preset: run, or that of a preset of configs/pretrain.py.

    run: any run; no label is needed. Records of the split `evaluation.test_split` must be there.
        With `--config.evaluation.probes="(('LABEL','video'),)"` labels are probed as well.
    demo, abstract, small: on the demo's videos, with supervised encoders and null controls, which
        train networks of their own: on 2 CPU cores at most 3.5 minutes, 2 of them for these.
    esc10: a run that was pretrained without fold 1; other folds by the two selections.
    others: ten views, as the field does. No run of that size has been evaluated with this code.
    """
    full_size = ("kinetics400", "kinetics400_vit", "kinetics600", "vggsound", "audioset")
    datasets.check_preset(preset, ("run", "demo", "abstract", "small", "esc10", *full_size))
    # The run runs/NAME is evaluated where no --workdir is given.
    name = "demo" if preset == "run" else preset
    c = ConfigDict(dict(task="avcl_jax.evaluation.evaluate:evaluate", name=name))
    # Where the records are; "" is where the run found them. True: test on records of pretraining.
    c.data = dict(directory="", allow_trained_on=False)
    c.bootstrap = dict(resamples=1000)
    c.execution = execution(threads=2, chunk=16, part_records=1024)

    c.evaluation = e = ConfigDict()
    # Splits, that of training for probes, and records by label (avcl_jax/data/selection.py).
    e.update(train_split="train", train_select="", test_split="test", test_select="")

    # Features and embeddings: means over clips at fixed times and speeds, cropped in the centre.
    e.speeds = ()  # of those that the run trained; () is all of them
    e.update(clips=4, recall_at=(1, 5, 10, 20, 50))
    e.update(probes=(), probe=linear_probe())  # linear probes of (label, modality)
    e.position_cells = 8  # histogram of position: cells x cells

    e.pairs_per_video = 10  # of views for temporal tasks, drawn as in training by one playback

    # Supervised encoders, an upper bound for each probe, by a fixed budget, from these views of
    # each training record at the speeds above; results.json has the training loss.
    e.supervised = dict(enabled=False, video=dict(views=8), audio=dict(views=24))
    e.supervised.video.fit = _fit(learning_rate=4e-3, epochs=30, decay_epochs=6)
    e.supervised.audio.fit = _fit(learning_rate=6e-3, epochs=40, decay_epochs=12)

    # Null controls: networks trained on speed and direction of stationary noise.
    e.null = dict(train_split="", test_split="")  # records of noise; "" leaves the controls out
    e.null.update(train_views=3, test_views=5)  # of each record at each speed in each direction
    e.null.fit = _fit(learning_rate=4e-3, epochs=4, decay_epochs=1)

    e.report = dict(queries=3, results=5, stills=3)  # queries in each direction

    if preset == "small":  # its own records have no labels
        c.data.directory = datasets.find("demo").directory
    if preset in ("demo", "abstract", "small"):
        e.speeds = (1, 2, 4)
        e.probes = (("motion", "video"), ("material", "audio"))
        e.supervised.enabled = True
        e.null.update(train_split="null_train", test_split="null_test")
    elif preset != "run":
        row = datasets.find(preset.removesuffix("_vit"))
        e.update(train_split=row.train, test_split=row.test)
        e.train_select, e.test_select = row.selections[0]
        if preset == "esc10":
            e.probes = ((row.label, row.modality),)
        else:
            e.update(speeds=(1, 2), clips=5, pairs_per_video=2)
            c.execution.update(threads=16, chunk=8)
    return c.lock()


def _fit(**settings: float) -> dict[str, float]:
    """Returns the training on labels; in the `decay_epochs`, the last, the rate falls to 0."""
    return dict(batch_size=32, weight_decay=0.05, **settings)
