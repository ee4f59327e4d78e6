"""Fingerprinting: is the source of a transformed clip found, and what do other methods find?

    python -m avcl_jax.main --config=configs/fingerprint.py --workdir=runs/demo_fingerprint
    python -m avcl_jax.main --config=configs/fingerprint.py:vggsound \\
        --config.encoder=gs://bucket/vggsound --workdir=gs://bucket/vggsound_fingerprint

`encoder` is the workdir of a pretraining run, an export, or imported weights. The baselines need
`pip install -r benchmarks/requirements.txt` and libchromaprint; without them they are left out.
"""

import dataclasses

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import Presets, choose, execution, protocol
from avcl_jax.fingerprint.settings import FingerprintSettings

FOLEY_OPTIONS = "--train=0 --test=400 --null=0 --seed=2"


def get_config(preset: str = "foley") -> ConfigDict:
    """Returns a preset: foley, real, vggsound or records."""
    return choose(preset, PRESETS, name="fingerprint_{}")


def foley() -> ConfigDict:
    """Clips as the demo's, of another seed, new to the encoder: half an hour on one core."""
    c = protocol("avcl_jax.fingerprint.benchmark.protocol:fingerprinting", "fingerprint")
    c.data = dict(directory="data/foley_fingerprint/records", split="test")
    c.data.prepare = f"avcl-data demo --out data/foley_fingerprint {FOLEY_OPTIONS}"
    # Every role takes records of its own of the split. References are indexed, others are foreign
    # footage of splices and exchanged audio, background is for normalised scores.
    c.data.update(references=200, distractors=100, others=50, background=50)
    c.data.allow_trained_on = False  # take records that the encoder met in pretraining
    c.data.files = ""  # folder of media files to cut into segments: the references of `real`

    # References that each family takes, and as many distractors.
    c.queries = dict(weak=3, medium=12, strong=3)
    c.families = ()  # () is all of avcl_jax/fingerprint/benchmark/families.py
    c.update(answers=5, tolerance_seconds=1.0)  # answers per query, of precision and µAP
    # How the index is made: avcl_jax/fingerprint/settings.py explains each.
    c.index = dataclasses.asdict(FingerprintSettings())
    c.baselines = ("image_hash", "chromaprint")
    c.execution = execution(threads=1)  # of the matrix products
    return c


def real() -> ConfigDict:
    """Segments of real videos among real audio and clips as the demo's; a hit is the very segment.

    References of the records are indexed, and never looked for. One CPU core: 8 minutes.
    """
    c = foley()
    c.data.update(files="../shared/data/media", audio_files="../shared/data/esc10/audio")
    c.data.update(segment_seconds=4.0, short_side=128, max_fps=16.0, sample_rate_hz=16_000)
    c.data.update(references=100, distractors=30, others=20, background=20)
    c.data.audio_clips = dict(fillers=100, distractors=30, background=20)
    return c


def _test_records(name: str) -> dict[str, object]:
    row = datasets.find(name)
    return {"data.directory": row.directory, "data.prepare": row.prepare, "data.split": row.test}


PRESETS: Presets = {
    "foley": (foley, {"name": "fingerprint"}),
    "real": (real, {}),
    # The paper shows fingerprinting on VGG-Sound. For a host of 16 cores; not run.
    "vggsound": (
        foley,
        {"encoder": "runs/vggsound", "data.references": 10_000, "data.distractors": 2_000}
        | {"data.others": 500, "data.background": 1_000}
        | {"queries.weak": 200, "queries.medium": 500, "queries.strong": 200}
        | _test_records("vggsound"),
    ),
    # Your own records, 400 of the split test: set data.directory.
    "records": (foley, _test_records("records")),
}
