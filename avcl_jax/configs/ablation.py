"""Ablations of the parts of the method on one data set, several seeds each.

    python -m avcl_jax.main --config=configs/ablation.py --workdir=runs/ablation

A sweep that was stopped resumes; machines that share a workdir may share the variants by
`--config.ablation.only="('no_va',)"`, and whichever comes last writes the table. Of a run that is
measured only its results.json is needed: checkpoints may be deleted.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import evaluate, pretrain
from avcl_jax.objectives.temporal import TASKS


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns the sweep over a preset of pretraining; only `demo` has settings that were run."""
    c = pretrain.get_config(preset)
    measured = evaluate.get_config("run" if preset == "records" else preset)
    c.unlock()
    c.update(task="avcl_jax.evaluation.ablation:ablate", name=f"ablation_{preset}")
    c.evaluation, c.bootstrap = measured.evaluation, measured.bootstrap
    c.execution = {**measured.execution, **c.execution}
    c.data.allow_trained_on = measured.data.allow_trained_on
    if preset == "demo":  # 2.5 minutes per run on 2 CPU cores, evaluation included
        c.steps = 900
        c.execution.update(checkpoint_every=300, keep_checkpoints=1)
        c.evaluation.supervised.enabled = False
        c.evaluation.null.train_split = ""
    # `only`: variants to run here; () runs all. Those that change nothing of this config, overrides
    # included, are left out.
    c.ablation = dict(seeds=(0, 1, 2), only=(), variants=VARIANTS)
    probes = [f"probe.{label}_from_{modality}." for label, modality in c.evaluation.probes]
    known = ("retrieval.", "temporal.", *probes)
    c.ablation.metrics = tuple(metric for metric in METRICS if metric[1].startswith(known))
    return c.lock()


def _without(*terms: str) -> tuple[tuple[str, object], ...]:
    return tuple((f"loss.weights.{term}", 0.0) for term in terms)


# Name of each variant and what it changes: pairs of setting and value.
VARIANTS: tuple[tuple[str, tuple[tuple[str, object], ...]], ...] = (
    ("full", ()),
    ("no_vv", _without("vv")),
    ("no_va", _without("va")),
    ("no_aa", _without("aa")),
    ("no_contrast", _without("vv", "va", "aa")),
    *(
        (f"no_{kind}", _without(*(name for name, task in TASKS.items() if task.kind == kind)))
        for kind in dict.fromkeys(task.kind for task in TASKS.values())
    ),
    ("no_temporal", _without(*TASKS)),
    ("no_order_within", _without("order_vv", "order_aa")),
    ("no_order_across", _without("order_va")),
    ("no_bank", (("bank.size", 0), ("bank.health_labels", ()))),
    ("no_bank_positives", (("loss.positive_weight", 0.0),)),
    ("no_bank_negatives", (("bank.num_negatives", 0),)),
    *((f"bank_space_{x}", (("bank.space", x),)) for x in ("same", "cross", "agreement")),
    *((f"audio_transform_{x}", (("views.audio_transform", x),)) for x in ("shared", "independent")),
)

# (column, path of the metric in the results.json of a run, term of the loss without which it is
# not defined: the head of a task that was not trained is as it was initialised).
METRICS = (
    ("motion, video", "probe.motion_from_video.pretrained", ""),
    ("material, audio", "probe.material_from_audio.pretrained", ""),
    ("R@5 audio → video", "retrieval.audio_to_video.r5", ""),
    ("R@5 video → audio", "retrieval.video_to_audio.r5", ""),
    *((task.title, f"temporal.{name}.accuracy", name) for name, task in TASKS.items()),
)
