"""Fingerprinting: is the source of a transformed clip found, and what do other methods find?

    python -m avcl_jax.main --config=configs/fingerprint.py --workdir=runs/demo_fingerprint
    python -m avcl_jax.main --config=configs/fingerprint.py:real --workdir=runs/real_fingerprint
    python -m avcl_jax.main --config=configs/fingerprint.py:vggsound \\
        --config.encoder=gs://bucket/vggsound --workdir=gs://bucket/vggsound_fingerprint

`encoder` is the workdir of a pretraining run, an export, or imported weights. The baselines need
`pip install -r benchmarks/requirements.txt` and libchromaprint; without them they are left out.
"""

from __future__ import annotations

import dataclasses

import ml_collections

from avcl_jax.fingerprint.settings import FingerprintSettings
from configs.presets import choose


def get_config(preset: str = "foley") -> ml_collections.ConfigDict:
    """The config of a preset: foley, real or vggsound."""
    return choose(preset, foley, real, vggsound)


def foley() -> ml_collections.ConfigDict:
    """Clips as the demo's, of another seed: neither encoder nor index was made with any of them.

    Hardware: one CPU core, half an hour beside other load; making the clips takes 40 s.
    """
    c = ml_collections.ConfigDict()
    c.task = "fingerprint"
    c.name = "fingerprint"
    c.seed = 0
    c.encoder = "runs/demo"

    c.data = ml_collections.ConfigDict()
    # Made by `python -m data_prep demo --out data/foley_fingerprint` with these options if absent.
    c.data.make_demo = True
    c.data.demo_options = ("--train=0", "--test=400", "--null=0", "--seed=2")
    c.data.directory = "data/foley_fingerprint/records"
    # Of this split every role takes records of its own, one role after the other.
    c.data.split = "test"
    c.data.references = 200  # indexed
    c.data.distractors = 100
    c.data.others = 50  # foreign footage of splices and exchanged sound
    c.data.background = 50  # for normalised scores
    c.data.allow_trained_on = False  # take records that the encoder met in pretraining
    c.data.files = ""  # folder of media files to cut into segments: the references of `real`

    # References that each family asks for, and as many distractors.
    c.queries = ml_collections.ConfigDict()
    c.queries.weak = 3
    c.queries.medium = 12
    c.queries.strong = 3
    c.families = ()  # () is all of avcl_jax/fingerprint/benchmark/families.py
    c.answers = 5  # to each query, that precision and µAP are over
    c.tolerance_seconds = 1.0

    # How the index is made: avcl_jax/fingerprint/settings.py says what each means.
    c.index = ml_collections.ConfigDict(dataclasses.asdict(FingerprintSettings()))
    c.baselines = ("image_hash", "chromaprint")

    c.bootstrap = ml_collections.ConfigDict()
    c.bootstrap.resamples = 1000
    c.threads = 1  # of the matrix products
    c.compilation_cache = "~/.cache/avcl_jax/xla"
    return c


def real() -> ml_collections.ConfigDict:
    """Segments of real videos among real sounds and clips as the demo's; a hit is the very segment.

    Hardware: one CPU core, 8 minutes.
    """
    c = foley()
    c.name = "fingerprint_real"
    c.data.files = "../shared/data/media"
    c.data.segment_seconds = 4.0
    c.data.short_side = 128
    c.data.max_fps = 16.0
    c.data.sample_rate_hz = 16_000
    c.data.references = 100  # of the records: indexed, and never looked for
    c.data.distractors = 30
    c.data.others = 20
    c.data.background = 20
    c.data.sounds = "../shared/data/esc10/audio"
    c.data.sound_sets = ml_collections.ConfigDict()
    c.data.sound_sets.fillers = 100
    c.data.sound_sets.distractors = 30
    c.data.sound_sets.background = 20
    return c


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound, on which the paper shows fingerprinting: test clips as references.

    Hardware: a host with 16 cores and any accelerator; never run by us.
    """
    c = foley()
    c.name = "fingerprint_vggsound"
    c.encoder = "runs/vggsound"
    c.data.make_demo = False
    c.data.directory = "data/vggsound"
    c.data.references = 10_000
    c.data.distractors = 2_000
    c.data.others = 500
    c.data.background = 1_000
    c.queries.weak = 200
    c.queries.medium = 500
    c.queries.strong = 200
    return c
