"""The Hub's own library reads our model cards and has the function that fetches encoders."""

from __future__ import annotations

import inspect

import pytest

from avcl_jax import weights

huggingface_hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.interop


def test_the_hub_reads_the_card_of_the_shipped_pair():
    card = huggingface_hub.ModelCard.load(weights.find("small") / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "avcl-jax")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["motion_from_video_pretrained"] == 0.955


def test_a_snapshot_is_fetched_by_the_arguments_that_we_give():
    inspect.signature(huggingface_hub.snapshot_download).bind(
        "someone/small", revision=None, allow_patterns=["video/*config.json"]
    )
