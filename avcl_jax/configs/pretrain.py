"""Pretraining: the demo, your own records, and full-size presets.

    python -m avcl_jax.main --config=configs/pretrain.py
    python -m avcl_jax.main --config=configs/pretrain.py:records --config.data.directory=data/mine
    python -m avcl_jax.main --config=configs/pretrain.py:kinetics400 --workdir=gs://bucket/run

Every scientific setting is in this file; the library has no defaults for them. `demo` explains each
setting, `kinetics400` why it has its value at full size. A setting that is computed from another
(`get_ref`) follows it when that one is overridden, unless it is overridden itself.
"""

from ml_collections import ConfigDict

from avcl_jax.configs import datasets
from avcl_jax.configs.common import Presets, choose, execution


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns a preset: one of `PRESETS`, at the end of this file."""
    return choose(preset, PRESETS, data=datasets.training)


def encoders(video: str, audio: str, *, subtract_time_mean: bool) -> ConfigDict:
    """Returns the sections `video` and `audio` of a model; `name` decides which settings are read.

    A published name (docs/encoders.md) reads no other section; a general name reads the section of
    that name, here of the demo's size. The demo trains `resnet`; the others were not trained.
    """
    c = ConfigDict()
    c.video = dict(name=video, subtract_time_mean=subtract_time_mean, lowering="auto")
    c.video.resnet = dict(widths=(24, 48, 96), depths=(0, 1, 1), stem="patch4", block="basic")
    c.video.resnet.update(factorisation="r2plus1d_plain", pool="mean")
    c.video.inception = dict(width=0.25, gating=False)
    c.video.transformer = dict(width=96, depth=4, heads=4, tubelet=(2, 8, 8))
    c.video.transformer.attention = "factorised"
    c.audio = dict(name=audio)
    c.audio.resnet = dict(widths=(32, 64, 128), depths=(1, 1, 1), stem="patch", patch=(2, 4))
    c.audio.convnet = dict(widths=(32, 64, 128), pool="max")
    c.audio.transformer = dict(width=96, depth=4, heads=4, patch=(4, 8))
    return c


def demo() -> ConfigDict:
    """The demo's rendered videos ("foley"), on a laptop.

    Hardware: 2 CPU cores, under 4 GB of memory. `make demo` runs everything from media to report;
    the README has its results.
    """
    c = ConfigDict(dict(task="avcl_jax.training.loop:pretrain", seed=0))
    c.update(steps=1500, global_batch_size=32)
    # Workdir of a run with whose parameters and statistics this one begins; and, if set, with the
    # moments of its optimizer and its feature bank.
    c.update(init_from="", init_optimizer=False, init_bank=False)
    # Above 1, networks process the batch, and normalise it, in this many parts, and losses the
    # whole: for contrastive batches larger than memory (docs/large_batches.md).
    c.micro_batches = 1
    c.modalities = "audio_visual"  # or "video", "audio"
    c.data = datasets.training("demo")

    c.views = dict(num_frames=12, clip_seconds=0.75, speeds=(1, 2, 4, 8))
    c.views.audio_transform = "shared"  # or "independent"
    c.crop = dict(image_size=48, min_area=0.75, flip=True)
    c.crop.quarter_turns = True  # the demo's videos have no preferred orientation
    c.photometric = dict(brightness=0.1, contrast=0.3, saturation=0.5, hue=0.5)
    c.photometric.update(gray_probability=0.2, per_frame=False)
    c.pixels = dict(mean=0.5, std=0.25)
    c.spectrogram = dict(sample_rate_hz=16_000, frames=48, mels=40, min_hz=60.0, max_hz=7_600.0)
    c.spectrogram.update(floor=1e-6, mean=-7.0, std=3.0)
    c.spectrogram.where = "host"  # or "device", inside the jitted step
    c.spectral = dict(equalizer=0.7, equalizer_knots=5, mask_mels=6, noise=0.15)

    c.model = encoders("resnet", "resnet", subtract_time_mean=True)
    c.model.update(dtype="float32", embedding_dim=128, projection_hidden=256, temporal_hidden=128)

    # Terms of modalities that are not trained are left out. A term's weight is multiplied by the
    # fraction of its examples that count: for order 0.80 here, as some pairs of speeds have none.
    weights = dict(vv=0.5, va=1.0, aa=0.5, order_vv=0.5, order_aa=0.5, order_va=0.5)
    weights.update(speed_video=0.5, speed_audio=0.5, direction_video=0.5, direction_audio=0.5)
    c.loss = dict(temperature=0.1, positive_weight=0.02, weights=weights)

    # Rows, two per video: a multiple of twice the batch. A bank is used once it is full; 0 is none.
    c.bank = dict(size=256, dtype="float32")
    c.bank.space = "agreement"  # or "same" (equal with one modality), "cross"
    c.bank.ranking = "content"  # or "raw", which ranks rows of the same playback first
    c.bank.num_positives = 2
    c.bank.positive_window = 1 / 32  # nearest fraction of the rows that positives are drawn from
    c.bank.positive_sampling = "gumbel"  # or "uniform"
    c.bank.num_negatives = 32
    c.bank.negative_candidates = 256  # rows chosen at random once per step, for all anchors
    c.bank.negative_offset = 0.125  # nearest fraction of them that each anchor leaves out
    c.bank.negative_sampling = "uniform"  # or "gumbel"
    c.bank.temperature = 0.1  # of Gumbel sampling
    c.bank.warmup_steps = c.get_ref("steps") * 3 // 5
    # Labels whose agreement between anchors and sampled rows is logged, beside the base rate.
    c.bank.health_labels = ("motion", "material")

    # Or "sgd": 300 steps of the demo (seed 0) reach a loss of 8.3 with learning rate 0.1 and weight
    # decay 1e-4, and of 8.9 with the values below.
    c.optimizer = dict(name="adamw", learning_rate=3e-3, warmup_steps=100, weight_decay=0.1)
    c.optimizer.update(momentum=0.9, beta2=0.98, clip_norm=5.0)
    # Above 0, the average of parameters and running statistics over about 1 / (1 - ema_decay) steps
    # is kept, exported and evaluated: untested.
    c.optimizer.ema_decay = 0.0

    c.execution = execution(workers=0, threads=2, max_bad_records=0, fsdp=1)
    c.execution.update(remat="none", log_every=50, checkpoint_every=500, keep_checkpoints=2)
    c.execution.update(on_nan="stop", accept_changes=False, profile_step=0, writers=())
    return c


def kinetics400() -> ConfigDict:
    """Kinetics-400, 246,000 clips of 10 s, 200 epochs: R(2+1)D-18, audio ResNet, 16 x 112².

    Intended hardware: TPU v5e-32 or 8 GPUs of 80 GB. Its step lowers (tests/test_configs.py); no
    training of this size has been run with this code, so there is no accuracy to expect yet. Each
    scientific value has its reason beside it, or "untested". "The relatives" are AVID-CMA, GDT,
    CrissCross and BraVe: docs/reproduction.md, "Settings beside those of relatives".
    """
    c = ConfigDict(dict(task="avcl_jax.training.loop:pretrain", seed=0))
    c.update(init_from="", init_optimizer=False, init_bank=False)
    c.steps = 96_000  # 200 epochs, as GDT
    c.global_batch_size = 512  # as BraVe; CrissCross 2,048
    c.update(micro_batches=1, modalities="audio_visual", data=datasets.training("kinetics400"))

    c.views = dict(num_frames=16)  # as BraVe; R(2+1)D-18's FLOPs are published for this input
    # At 0.75 s two views of a 10 s video fit in every order for all pairs of speeds but (8, 8), at
    # 1.0 s for 11 of 16. Clips have 21.3 frames/s; videos under 0.45 of that (9.6) have no speed
    # task. Relatives: 0.5 to 1.3 s of video, 1 to 10 s of audio. On ESC-10 (docs/reproduction.md,
    # "Audio settings on ESC-10") 0.5 s costs the class 4 points, and 1.0 s gives no clear gain.
    c.views.clip_seconds = 0.75
    c.views.speeds = (1, 2, 4, 8)  # the demo's, untested: no relative varies the speed
    c.views.audio_transform = "shared"  # one playback for video and audio: the demo's, untested

    # As GDT and CrissCross; as all relatives; real cameras have an upright.
    c.crop = dict(image_size=112, flip=True, quarter_turns=False)
    # As BraVe. The smallest crop of a 128-pixel record is 70 pixels wide, enlarged 1.6 times; the
    # 0.08 of AVID-CMA and CrissCross, 36 pixels, requires larger records (--short-side).
    c.crop.min_area = 0.3
    c.photometric = dict(contrast=0.4, saturation=0.4)  # as all four relatives
    c.photometric.brightness = 0.125  # added, as BraVe's; the others multiply by 0.6 to 1.4
    c.photometric.hue = 0.2  # as AVID-CMA, CrissCross, BraVe
    c.photometric.gray_probability = 0.2  # as CrissCross and BraVe
    c.photometric.per_frame = False  # the demo's, untested
    c.pixels = dict(mean=0.5, std=0.25)  # near GDT's 0.45 and 0.225

    c.spectrogram = dict(sample_rate_hz=16_000, mels=80)  # as CrissCross; mels as BraVe too
    # Windows do not overlap at any speed, so more are shorter and resolve fewer bands: 24 of 500
    # samples (31 ms; relatives 7 to 64) resolve all 80, the demo's 250 samples 66. The step in time
    # exceeds relatives' (3 to 10 ms): speed and direction on ESC-10 lose at most 4 points (95 %).
    c.spectrogram.update(frames=24, where="device")
    c.spectrogram.update(min_hz=60.0, max_hz=7_600.0)  # BraVe from 80
    # The mean as CrissCross: its -5.37 for windows of 1,024 is -6.80 for 500 (power grows with the
    # square). std: untested. A floor of 1e-8 without the file's mean costs 4 points on ESC-10.
    c.spectrogram.update(mean=-7.0, std=3.0, floor=1e-6)
    c.spectral = dict(mask_mels=12)  # 15 % of the bands, as the demo; GDT 8, CrissCross twice 13 %
    # The demo's and untested. Relatives scale the volume by up to 10 or 20 %; here the mean level
    # is kept, because loudness is evidence of temporal order, and on ESC-10 neither a random gain
    # of 6 or 12 dB nor removing the level gains anything.
    c.spectral.update(equalizer=0.7, equalizer_knots=5, noise=0.15)

    c.model = encoders("r2plus1d_18", "resnet_9", subtract_time_mean=False)  # both as GDT
    # As AVID-CMA, 512 as GDT too; no relative has temporal heads: untested.
    c.model.update(embedding_dim=128, projection_hidden=512, temporal_hidden=512, dtype="bfloat16")

    # The demo's and untested. At the start, when every loss is the logarithm of its number of
    # choices, contrastive terms are 13.9 of the total and temporal tasks at most 3.7. The
    # audio-audio term is ours: `--config.loss.weights.aa=0` trains by the abstract.
    weights = dict(vv=0.5, va=1.0, aa=0.5, order_vv=0.5, order_aa=0.5, order_va=0.5)
    weights.update(speed_video=0.5, speed_audio=0.5, direction_video=0.5, direction_audio=0.5)
    # The demo's temperature, untested; AVID-CMA, GDT: 0.07.
    c.loss = dict(temperature=0.1, weights=weights)
    c.loss.positive_weight = 0.1  # untested; AVID-CMA: half, in a loss of its own

    batch = c.get_ref("global_batch_size")
    c.bank = dict(dtype="bfloat16", temperature=0.1)  # temperature as the demo, untested
    c.bank.size = 128 * batch  # rows of the last 64 steps, 7 to 18 % of the videos: untested
    c.bank.space = "agreement"  # AVID-CMA's "consensus"
    # The next five are untested. AVID-CMA uses the 32 nearest rows as positives, and 64 (within) or
    # 1,024 (across) of all others as negatives.
    c.bank.update(num_positives=8, num_negatives=256, negative_candidates=2048)
    c.bank.positive_window = 1 / 2048  # 32 of the 65,536 rows at batch 512
    c.bank.negative_offset = 0.02  # above the 0.25 % of Kinetics-400 that share a class
    # The demo's and untested.
    c.bank.update(ranking="content", positive_sampling="gumbel", negative_sampling="uniform")
    # Positives are as good as the features that select them; the learning rate is then at 0.54 to
    # 0.6 of its peak. AVID-CMA: after 30 of 50 epochs, on AudioSet 40 of 80.
    c.bank.warmup_steps = c.get_ref("steps") // 2
    c.bank.health_labels = ("class",)

    c.optimizer = dict(name="adamw", momentum=0.9)  # 0.9 as all
    # Untested. Relatives with Adam: 1e-4 to 5e-4 for batches of 160 per node to 2,048. Scaled with
    # the root of the batch, as adaptive optimizers need (Malladi et al. 2022, arXiv 2205.10287).
    c.optimizer.learning_rate = 5e-4 * (batch.to_float() / 512) ** 0.5
    c.optimizer.warmup_steps = 5_000  # as BraVe; 10 epochs of Kinetics-400, as GDT
    # Decoupled, untested: its time constant is at most 20,000 steps at the peak rate
    # (docs/reproduction.md has the relatives' L2).
    c.optimizer.weight_decay = 0.1
    c.optimizer.beta2 = 0.999  # as AVID-CMA, CrissCross; the demo's 0.98 averages over 50 steps
    c.optimizer.clip_norm = 5.0  # untested, no relative clips
    # As all: the cosine ends at 0, so an average over the last 1,000 steps, at under 0.2 % of the
    # peak rate, would equal the last parameters.
    c.optimizer.ema_decay = 0.0

    # 32 workers with one thread each were fastest: docs/data/pipeline_speed.md.
    c.execution = execution(workers=32, threads=1, max_bad_records=0, fsdp=1)
    c.execution.update(remat="none", log_every=100, checkpoint_every=2_000, keep_checkpoints=3)
    c.execution.update(on_nan="stop", accept_changes=False, profile_step=0, writers=())
    return c


_SMALL_DATA = "avcl-data small ESC-50/ --out data/small"

PRESETS: Presets = {
    "demo": (demo, {}),
    # The contrastive terms of the paper's abstract, video-video and video-audio: aa is ours.
    "abstract": (demo, {"loss.weights.aa": 0.0}),
    # The encoders that come with the package: docs/encoders.md. Rendered videos and recordings of
    # ESC-10, half each, so that a batch has as many recordings as that of `esc10`; they last 5 s,
    # too short for two views at speed 8.
    "small": (
        demo,
        {"steps": 3200, "global_batch_size": 64, "views.speeds": (1, 2, 4), "loss.weights.aa": 1.0}
        | {"model.audio.resnet.widths": (48, 96, 192), "bank.size": 512, "bank.health_labels": ()}
        | {"data.directory": "data/small/records", "data.prepare": _SMALL_DATA}
        | {"execution.checkpoint_every": 800},
    ),
    # Your own records, at the size of the demo; runs/NAME is named after their directory.
    "records": (demo, {"name": "", "bank.health_labels": ()}),
    # ESC-10, audio alone, on 2 CPU cores in under 8 minutes: recordings of 5 s without a test fold
    # (`--config.data.select='fold!=1' --workdir=runs/esc10/seed0/fold1`; benchmarks/esc10.py runs
    # all folds and seeds: docs/reproduction.md), too short for two views at speed 8.
    "esc10": (
        demo,
        {"steps": 2000, "modalities": "audio", "views.speeds": (1, 2, 4), "loss.weights.aa": 1.0}
        | {"bank.health_labels": ()}
        | {"execution.checkpoint_every": 1000, "execution.keep_checkpoints": 1},
    ),
    "kinetics400": (kinetics400, {}),
    # The same with encoders whose widths, heads and numbers of tokens are multiples of the 128 of a
    # matrix unit, and as many operations per clip: 256 tubelets, 128 patches. TPU v5e-32; not run.
    "kinetics400_vit": (
        kinetics400,
        {"model.video.name": "transformer", "model.audio.name": "transformer"}
        | {"model.video.transformer.width": 1024, "model.video.transformer.depth": 12}
        | {"model.video.transformer.heads": 8, "model.video.transformer.tubelet": (4, 14, 14)}
        | {"model.video.transformer.attention": "joint"}
        | {"model.audio.transformer.width": 512, "model.audio.transformer.depth": 6}
        | {"model.audio.transformer.heads": 4, "model.audio.transformer.patch": (3, 5)},
    ),
    # 392,000 clips of 10 s, 200 epochs: TPU v5e-64 or 16 GPUs of 80 GB; not run.
    "kinetics600": (kinetics400, {"steps": 76_500, "global_batch_size": 1024}),
    # 184,000 training clips of 10 s, 200 epochs; not run. Audio sources are visible, hence the
    # weight of va: untested.
    "vggsound": (kinetics400, {"steps": 72_000, "loss.weights.va": 1.5}),
    # About 1.9 million clips of 10 s, 50 epochs, because it is 5 to 10 times as large: TPU v5e-128
    # or 32 GPUs of 80 GB; not run. Health needs one class per record, and clips have several.
    "audioset": (
        kinetics400,
        {"steps": 46_000, "global_batch_size": 2048, "bank.health_labels": ()},
    ),
}
