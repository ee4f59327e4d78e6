"""Every file of the shared real media, through preparation and into training batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.pipeline import train_batches
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from configs import pretrain
from data_prep.__main__ import main as data_prep

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "data" / "media"
pytestmark = pytest.mark.skipif(not MEDIA.exists(), reason=f"no real media in {MEDIA}")

# A tenth of a second long.
NO_VIEW = {"unordered", "video_90", "video_180", "video_270"}


def test_every_file_is_in_a_training_batch_or_refused_with_a_reason(tmp_path):
    out = tmp_path / "records"
    status = data_prep(["prepare", str(MEDIA), f"--out={out}", "--short-side=64", "--workers=2"])
    assert status == 3  # complete, with refusals
    refused = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name: line["reason"] for line in refused} == {
        "corrupted.mp4": "damaged",
        "-video-with-dash-.mp4": "too_small",
    }
    spec = experiment.render_spec(pretrain.get_config())
    records = RecordDataset(out, "train")
    # A camera whose lens is covered: black, with noise.
    assert [record.record_id for record in records if record.is_still] == ["no_duration.webm"]
    source = UsableRecords(records, spec)
    left_out = {records.record_ids[i] for i in range(len(records))} - {
        records.record_ids[i] for i in source.indices
    }
    assert {Path(name).stem for name in left_out} == NO_VIEW
    assert len(records) + len(refused) == len(list(MEDIA.iterdir()))
    size = len(source)
    batches = train_batches(source, spec, seed=0, global_batch_size=size)
    for batch in itertools.islice(iter(batches), 2):
        assert sorted(batch["record_index"]) == sorted(source.indices)
        assert batch["video"].shape == (size, 2, 12, 48, 48, 3)
        assert np.isfinite(batch["spectrogram"]).all()
        for row, index in enumerate(batch["record_index"]):
            use = source.usable(int(np.flatnonzero(source.indices == index)[0]))
            assert batch["has_video"][row] == use.has_video
            assert use.has_audio or not batch["has_audio"][row].any()
            # Real pictures have contrast. A silent view of a sounding record is the floor of the
            # log-mel, and not the zeros that stand for what is missing.
            assert (batch["video"][row].std() > 1) == use.has_video
            assert batch["spectrogram"][row].any() == use.has_audio
    assert batch["has_audio"].any(axis=1).sum() >= 7
