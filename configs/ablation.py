"""Ablations of the parts of the method on one data set, several seeds each.

    python -m avcl_jax.main --config=configs/ablation.py --workdir=runs/ablation
    python -m avcl_jax.main --config=configs/ablation.py --config.ablation.only="('no_va',)" \\
        --workdir=gs://bucket/ablation

A sweep that is stopped goes on where it was; machines that share a workdir may share the variants
by `ablation.only`, and whichever comes last writes the table. Of a run that is measured only its
results.json is needed: checkpoints may be deleted.
"""

from __future__ import annotations

import ml_collections

from avcl_jax.objectives.temporal import TASKS
from configs import evaluate, pretrain

# Kind of task → names of its tasks.
_TASKS = {
    kind: tuple(name for name, task in TASKS.items() if task.kind == kind)
    for kind in dict.fromkeys(task.kind for task in TASKS.values())
}


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The sweep over a pretraining preset; only `demo` has settings that were run."""
    c = pretrain.get_config(preset)
    c.unlock()
    measured = evaluate.get_config(preset)
    c.evaluation, c.bootstrap = measured.evaluation, measured.bootstrap
    c.data.allow_trained_on = measured.data.allow_trained_on
    c.task = "ablation"
    c.name = f"ablation_{preset}"
    if preset == "demo":
        demo(c)
    c.ablation = ml_collections.ConfigDict()
    c.ablation.seeds = (0, 1, 2)
    c.ablation.only = ()  # variants to run here; () runs all
    # Those that change nothing of this config, overrides included, are left out.
    c.ablation.variants = VARIANTS
    probes = {f"{label}_from_{modality}" for label, modality in c.evaluation.probes}
    c.ablation.figures = tuple(
        figure for figure in FIGURES if _probe_of(figure[1]) in {None, *probes}
    )
    c.lock()
    return c


def _probe_of(path: str) -> str | None:
    kind, name, _ = path.split(".")
    return name if kind == "probe" else None


def _without(*terms: str) -> tuple[tuple[str, object], ...]:
    return tuple((f"loss.weights.{term}", 0.0) for term in terms)


# Name of each variant and what it changes: pairs of setting and value.
VARIANTS: tuple[tuple[str, tuple[tuple[str, object], ...]], ...] = (
    ("full", ()),
    ("no_vv", _without("vv")),
    ("no_va", _without("va")),
    ("no_aa", _without("aa")),
    ("no_contrast", _without("vv", "va", "aa")),
    *((f"no_{kind}", _without(*tasks)) for kind, tasks in _TASKS.items()),
    ("no_temporal", _without(*TASKS)),
    ("no_order_within", _without("order_vv", "order_aa")),
    ("no_order_across", _without("order_va")),
    ("no_bank", (("bank.size", 0), ("bank.health_labels", ()))),
    ("no_bank_positives", (("loss.positive_weight", 0.0),)),
    ("no_bank_negatives", (("bank.num_negatives", 0),)),
    *(
        (f"bank_space_{space}", (("bank.space", space),))
        for space in ("same", "cross", "agreement")
    ),
    *(
        (f"audio_transform_{transform}", (("views.audio_transform", transform),))
        for transform in ("shared", "independent")
    ),
)

# (column, path of the metric in the results.json of a run, term of the loss without which it is
# not defined: the head of a task that was not trained is as it was initialised).
FIGURES = (
    ("motion, video", "probe.motion_from_video.pretrained", ""),
    ("material, audio", "probe.material_from_audio.pretrained", ""),
    ("R@5 audio → video", "retrieval.audio_to_video.r5", ""),
    ("R@5 video → audio", "retrieval.video_to_audio.r5", ""),
    *((task.title, f"temporal.{name}.accuracy", name) for name, task in TASKS.items()),
)


def demo(c: ml_collections.ConfigDict) -> None:
    """A run of the demo shortened to three fifths: 2.5 minutes on 2 CPU cores, evaluation included.

    The bank is on from the same share of the run as in the demo.
    """
    c.steps = 900
    c.bank.warmup_steps = 540
    c.checkpoint_every = 300
    c.keep_checkpoints = 1
    c.evaluation.supervised.enabled = False
    c.evaluation.null.train_split = ""
