"""Examples in the report: cards of records, maps, samples from the feature bank."""

from __future__ import annotations

import dataclasses
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avcl_jax import experiment
from avcl_jax.data.records import RecordDataset
from avcl_jax.data.selection import UsableRecords
from avcl_jax.evaluation.exhibits import Exhibits, bank_searches, bank_section, open_bank
from avcl_jax.evaluation.run_report import class_plane, embedding_map
from avcl_jax.objectives.bank_rows import BankRows, RowNumbers
from avcl_jax.objectives.feature_bank import FeatureBank
from avcl_jax.training import checkpoint
from avcl_jax.training.checkpoint import Checkpoints, Progress
from tests.evaluation.conftest import small_config, small_evaluation

VIDEOS = 16  # the first training records, each with two rows
KINDS = ("motion", "material")


def _host_spec(config):
    return dataclasses.replace(experiment.render_spec(config), spectrogram_on_device=False)


def test_a_record_too_short_for_the_speed_is_shown_at_one_that_fits(small_records):
    config, cards = small_config(small_records), []
    for speeds in ((4, 16, 64), (1, 4, 16)):  # the middle one: 4 s and 1 s; records last 3 s
        config.views.speeds = speeds
        spec = _host_spec(config)
        source = UsableRecords(RecordDataset(small_records, "test"), spec)
        cards.append(Exhibits(source, spec, stills=3))
    _, fitting = cards
    # Not the bytes of the clip: on a busy machine x264 does not always make the same stream.
    same = (re.sub('data-clip="[^"]*"', "", shown.card(0, "1")) for shown in cards)
    assert len(set(same)) == 1
    shown = fitting.card(0, "1 & 2", given="audio", kind="hit")
    assert shown.count("data:image/jpeg;base64,") == 3
    assert "<b>1 &amp; 2</b> test/0" in shown
    assert 'class="stills unseen"' in shown
    assert "low, across" in shown
    assert "unseen" not in fitting.card(0, "1")
    assert 'alt="spectrogram" class="unseen"' in fitting.card(0, "1", given="video")


def _clusters(rng: np.random.Generator, items: int, distance: float):
    labels = np.arange(items) % 3
    return rng.normal(size=(items, 20)) + distance * np.eye(3, 20)[labels], labels


@pytest.mark.parametrize(("distance", "low", "high"), [(8.0, 0.95, 1.0), (0.0, 0.0, 0.5)])
def test_the_plane_shows_classes_where_there_are_some_and_none_where_there_are_none(
    distance, low, high
):
    rng = np.random.default_rng(0)
    train, train_labels = _clusters(rng, 300, distance)
    test, labels = _clusters(rng, 150, distance)
    placed = class_plane(train, train_labels, test)
    assert placed.shape == (150, 2)
    centres = np.stack([placed[labels == c].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(placed[:, None] - centres, axis=-1).argmin(axis=1)
    assert low <= (nearest == labels).mean() <= high


def test_the_map_keeps_clusters_together():
    features, labels = _clusters(np.random.default_rng(1), 90, 12.0)
    rows, placed = embedding_map(features, seed=0)
    np.testing.assert_array_equal(rows, np.arange(90))
    distances = np.linalg.norm(placed[:, None] - placed[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(axis=1)] == labels).mean() > 0.95


def _bank(records: UsableRecords) -> FeatureBank:
    """Rows in which videos of one motion look alike and those of one material sound alike."""
    rng = np.random.default_rng(0)
    labels = np.stack([records.records.labels[kind][:VIDEOS] for kind in KINDS], axis=1)

    def embeddings(label):
        rows = np.eye(8)[label].repeat(2, axis=0) + 0.2 * rng.normal(size=(2 * VIDEOS, 8))
        return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), jnp.float32)

    playback = rng.integers(0, 6, 2 * VIDEOS)
    # The ring has turned: the newest rows lie in front.
    insertion = np.roll(np.arange(2 * VIDEOS), 8) + 2 * VIDEOS
    columns = [insertion, records.records.source_numbers[:VIDEOS].repeat(2), playback, playback]
    columns = np.concatenate([np.stack(columns, axis=1), labels.repeat(2, axis=0)], axis=1)
    rows = BankRows(
        embeddings={"video": embeddings(labels[:, 0]), "audio": embeddings(labels[:, 1])},
        presence=jnp.full(2 * VIDEOS, 3, jnp.uint8),
        numbers=RowNumbers(jnp.asarray(columns, jnp.int32)),
    )
    return FeatureBank(rows, jnp.asarray(4 * VIDEOS, jnp.int32))


@pytest.fixture(scope="module")
def run(small_run, small_records, tmp_path_factory):
    """Config, directory, rendering, records and bank of a run at step 20, whose bank was used."""
    config = small_config(small_records)
    config.bank.update({"size": 2 * VIDEOS, "warmup_steps": 10, "health_labels": KINDS})
    config.bank.update({"num_positives": 2, "positive_window": 0.125, "num_negatives": 6})
    config.bank.update({"negative_candidates": 2 * VIDEOS, "ranking": "raw"})
    config.evaluation = small_evaluation().evaluation
    config.evaluation.report.update({"queries": 3, "results": 5, "stills": 2})
    spec = _host_spec(config)
    records = UsableRecords(RecordDataset(small_records, "train"), spec)
    workdir = tmp_path_factory.mktemp("with_bank")
    bank = _bank(records)
    state = dataclasses.replace(small_run[2], bank=bank)
    with Checkpoints(workdir, keep=1) as manager:
        manager.save(state, Progress(20, 1.0, records.fingerprint, 1))
    return config, workdir, spec, records, jax.tree.map(np.asarray, bank)


@pytest.fixture(scope="module")
def agreeing(run):
    """Searches of that run, which ranks by video and audio for all its terms alike."""
    config, workdir, spec, _, _ = run
    return bank_searches(config, *open_bank(config, workdir, spec, step=20))


@pytest.mark.parametrize(
    ("space", "term", "pairs"),
    [
        ("agreement", "all", {"By video and audio": (("video", "video"), ("audio", "audio"))}),
        ("same", "aa", {"By audio": (("audio", "audio"),)}),
        ("cross", "vv", {"Audio by video": (("video", "audio"),)}),
    ],
)
def test_anchors_are_shown_with_rows_of_the_bank_and_their_similarity(
    run, agreeing, space, term, pairs
):
    config, _, _, records, bank = run
    found = agreeing
    if term != "all":
        config = config.copy_and_resolve_references()
        config.bank.space = space
        config.loss.weights.update({other: 0.0 for other in {"vv", "va", "aa"} - {term}})
        found = bank_searches(config, records, bank)
    assert list(found) == list(pairs)
    sources = bank.rows.numbers.source_id
    for title, searches in found.items():
        assert len({rows[0].position for rows, _ in searches}) == 3
        for (anchor, *samples), _ in searches:
            assert [row.kind for row in samples] == ["positive"] * 2 + ["negative"] * 3
            given = pairs[title][0] if len(pairs[title]) == 1 else ("both", "both")
            assert [(anchor.given, row.given) for row in samples] == [given] * 5
            (query,) = np.flatnonzero(sources == int(records.sources[anchor.position]))[:1]
            for sample in samples:
                assert sample.position != anchor.position
                rows = np.flatnonzero(sources == int(records.sources[sample.position]))
                z = bank.rows.embeddings
                expected = [
                    [z[own][query] @ z[other][row] for row in rows] for own, other in pairs[title]
                ]
                # One of the two rows of that video.
                near = np.abs(np.transpose(expected) - sample.cosines) <= 1e-5
                assert near.all(axis=1).any()
            cosines = [min(sample.cosines) for sample in samples]
            assert cosines[2:] == sorted(cosines[2:], reverse=True)
            if space == "same":
                assert min(cosines[:2]) > max(cosines[2:])


def test_the_section_shows_stills_spectrograms_playback_and_shared_labels(run, agreeing):
    _, _, spec, records, bank = run
    shown = bank_section(Exhibits(records, spec, stills=2), agreeing)
    assert shown.count("data:image/jpeg;base64,") == 3 * 6 * 2
    assert shown.count("data:image/png;base64,") == 3 * 6
    assert shown.count('class="video hit"') == 3 * 2
    assert shown.count("<b>anchor </b>") == 3
    assert len(re.findall(r"<b>positive -?\d\.\d\d / -?\d\.\d\d</b>", shown)) == 6
    assert "unseen" not in shown
    # Half of the other sources' rows share the motion less the anchor's own: 14 of 30.
    remarks = re.findall(
        r"(\d) of 2 positives, (\d) of 6 negatives share its (\w+), (\d+) % of the bank do", shown
    )
    assert [remark[2:] for remark in remarks] == [("motion", "47"), ("material", "47")] * 3
    # Positives by video and audio share both.
    assert all(remark[0] == "2" for remark in remarks)
    (searches,) = agreeing.values()
    anchor = searches[0][0][0]
    numbers = bank.rows.numbers[2 * anchor.position]
    played = int(numbers.playback("video"))
    motion, material = numbers.label
    labels = [("low", "high")[material], ("across", "down")[motion]]
    back = " backward" if played % 2 else ""
    assert anchor.labels == ", ".join([*labels, f"{(1, 2, 4)[played // 2]}×{back}"])


def test_a_bank_that_is_not_used_or_without_its_records_is_not_opened(run, tmp_path):
    config, workdir, spec, _, _ = run

    def opened(step=20, **changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        return open_bank(changed, workdir, spec, step=step)

    assert opened() is not None
    assert opened(step=10) is None
    assert opened(**{"bank.size": 0}) is None
    assert opened(**{"data.split": "validation"}) is None
    assert opened(**{"data.directory": str(tmp_path)}) is None
    assert opened(**{"data.select": "motion=across"}) is None
    # An older version's bank had other fields.
    older = {"bank": {"video": np.zeros((32, 8)), "inserted": 32}}
    with mock.patch.object(checkpoint, "load_state", return_value=(older, 20)):
        assert opened() is None
