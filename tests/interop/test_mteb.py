"""Encoders as a model of mteb, on tasks of local data."""

from __future__ import annotations

import numpy as np
import pytest

from avcl_jax.data.media import decode_media
from avcl_jax.errors import UserError
from avcl_jax.export.runs import open_encoders
from tests.evaluation.labelled import write_encoders
from tests.fingerprint.synthetic import clip, write

pytestmark = pytest.mark.interop
mteb = pytest.importorskip("mteb", reason="pip install mteb")
datasets = pytest.importorskip("datasets")

DESCRIPTION = {
    "description": "Is a clip dark?",
    "reference": "https://github.com/avcl-jax/avcl-jax",
    "dataset": {"path": "none", "revision": "none"},
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "accuracy",
    "date": ("2026-11-30", "2026-11-30"),
    "dialect": [],
    "domains": [],
    "task_subtypes": [],
    "license": "cc0-1.0",
    "annotations_creators": "derived",
    "sample_creation": "created",
    "bibtex_citation": "",
}


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files of clips, the even ones darker and quieter."""
    folder = tmp_path_factory.mktemp("media")
    paths = []
    for n in range(16):
        made = clip(n, 2.0)
        if n % 2 == 0:
            made.frames[:] //= 4
            made.waveform[:] //= 64
        paths.append(write(folder / f"{n}.mp4", made))
    return paths


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    write_encoders(directory / "export")
    return directory


def task(columns, paths):
    """A classification of mteb, trained on half of the files; each other item is of bytes."""
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    kind = {"video": datasets.Video(), "audio": datasets.Audio(), "text": datasets.Value("string")}
    several = len(columns) > 1

    class Task(AbsTaskClassification):
        metadata = TaskMetadata(
            name="Dark",
            type="VideoClassification" if "video" in columns else "AudioClassification",
            category=f"{''.join(column[0] for column in columns)}2c",
            modalities=list(columns),
            **DESCRIPTION,
        )
        input_column_name = tuple(columns) if several else columns[0]
        n_experiments = 2

        def load_data(self, **_):
            def split(numbers):
                def item(n):
                    return paths[n].read_bytes() if n % 3 else str(paths[n])

                def of(column, n):
                    file = item(n)
                    by_path = isinstance(file, str)
                    cell = {"path": file if by_path else None, "bytes": None if by_path else file}
                    return str(n) if column == "text" else cell

                rows = {column: [of(column, n) for n in numbers] for column in columns}
                rows["label"] = [n % 2 for n in numbers]
                made = datasets.Dataset.from_dict(rows)
                for column in columns:  # a cast needs no torchcodec
                    made = made.cast_column(column, kind[column])
                return made

            self.dataset = datasets.DatasetDict(train=split(range(8)), test=split(range(8, 16)))
            self.data_loaded = True

    return Task()


@pytest.mark.parametrize("columns", [("video",), ("audio",), ("video", "audio")])
def test_a_task_of_local_data(columns, media, encoders, tmp_path):
    from avcl_jax.export.mteb import MtebEncoder

    model = MtebEncoder(encoders)
    results = mteb.evaluate(model, task(columns, media), cache=None, show_progress_bar=False)
    scores = results.task_results[0].scores["test"][0]
    assert scores["accuracy"] > 0.8


def test_embeddings_are_means_of_the_encoders(media, encoders):
    from torch.utils.data import DataLoader

    from avcl_jax.export.mteb import MtebEncoder, _decoding

    model = MtebEncoder(encoders)
    both = task(("video", "audio"), media)
    both.load_data()
    loader = DataLoader(both.dataset["test"], batch_size=3)
    made = model.encode(loader, task_metadata=both.metadata, hf_split="", hf_subset="")
    expected = []
    for encoder in open_encoders(encoders).encoders.values():
        decoded = decode_media(media[9], **_decoding(encoder))
        video = (decoded.frames, decoded.fps)
        audio = (decoded.waveform, decoded.sample_rate_hz)
        mean = encoder(*(video if encoder.modality == "video" else audio)).mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    video = len(expected[0])
    assert made.shape == (8, video + len(expected[1]))
    assert float(made[1, :video] @ expected[0]) > 0.999
    assert float(made[1, video:] @ expected[1]) > 0.999
    np.testing.assert_allclose(np.diag(model.similarity(made, made)), 1, atol=1e-5)
    np.testing.assert_allclose(model.similarity_pairwise(made, made), 1, atol=1e-5)


def test_a_task_of_other_inputs_is_refused(media, encoders):
    from torch.utils.data import DataLoader

    from avcl_jax.export.mteb import MtebEncoder

    text = task(("text",), media)
    text.load_data()
    with pytest.raises(UserError, match="Dark has the inputs text, label: the encoders take video"):
        MtebEncoder(encoders).encode(DataLoader(text.dataset["test"]), task_metadata=text.metadata)
