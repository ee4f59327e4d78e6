"""Pretraining: the embedded demo, and full-size presets.

    python -m avcl_jax.main --config=configs/pretrain.py
    python -m avcl_jax.main --config=configs/pretrain.py:kinetics400 --workdir=gs://bucket/run
    python -m avcl_jax.main --config=configs/pretrain.py --config.steps=200 --workdir=/tmp/run

Every scientific setting lives here; the library has no defaults for them.
"""

from __future__ import annotations

import ml_collections

from configs import training
from configs.presets import choose


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, abstract, records, esc10, or a full-size data set."""
    return choose(
        preset, demo, abstract, records, esc10, kinetics400, kinetics600, vggsound, audioset
    )


def demo() -> ml_collections.ConfigDict:
    """The embedded demo data set "foley", on a laptop.

    python -m avcl_jax.main --config=configs/pretrain.py

    Hardware: 2 CPU cores, under 4 GB of memory. Makes the media and prepares them if they are not
    there yet. Run whole, from media to report, by `make demo`; figures are in the README.
    """
    c = ml_collections.ConfigDict()
    c.task = "pretrain"
    c.name = "demo"
    c.seed = 0
    c.steps = 1500
    c.global_batch_size = 32
    # Above 1, the networks process the batch in this many parts and the losses the whole: for
    # contrastive batches larger than memory, with one more forward pass. Batch normalisation is
    # then over a part: docs/large_batches.md.
    c.micro_batches = 1
    c.modalities = "audio_visual"  # or "video", "audio"

    c.data = ml_collections.ConfigDict()
    c.data.make_demo = True  # make and prepare the foley media if `directory` does not exist
    c.data.directory = "data/foley/records"
    c.data.split = "train"
    c.data.select = ""  # records by label, for instance "fold!=1": avcl_jax/data/selection.py
    c.data.workers = 0  # processes; 0 renders in threads, which suits few cores
    c.data.threads = 2
    c.data.prefetch = 4  # batches kept ready
    c.data.max_bad_records = 0  # one that cannot be read stops the run; above 0 is left out

    c.views = ml_collections.ConfigDict()
    c.views.num_frames = 12
    c.views.clip_seconds = 0.75
    c.views.speeds = (1, 2, 4, 8)
    c.views.audio_transform = "shared"  # or "independent"

    training.demo_augmentation(c)  # crop, photometric, spectral
    c.crop.image_size = 48

    c.pixels = ml_collections.ConfigDict()
    c.pixels.mean = 0.5
    c.pixels.std = 0.25

    c.spectrogram = ml_collections.ConfigDict()
    c.spectrogram.sample_rate_hz = 16_000
    c.spectrogram.frames = 48
    c.spectrogram.mels = 40
    c.spectrogram.min_hz = 60.0
    c.spectrogram.max_hz = 7_600.0
    c.spectrogram.floor = 1e-6
    c.spectrogram.mean = -7.0
    c.spectrogram.std = 3.0
    c.spectrogram.where = "host"  # or "device", inside the jitted step

    c.model = ml_collections.ConfigDict()
    c.model.dtype = "float32"
    # What the backward pass computes again instead of keeping it: "norms" (normalisation and
    # activation) or "blocks" (convolutions too). docs/large_batches.md
    c.model.remat = "none"
    c.model.embedding_dim = 128
    c.model.projection_hidden = 256
    c.model.temporal_hidden = 128
    _encoders(c.model)

    c.loss = ml_collections.ConfigDict()
    c.loss.temperature = 0.1
    c.loss.positive_weight = 0.02
    # Terms of modalities that are not trained are left out. In a batch, the weight of a term is
    # multiplied by the fraction of its examples that count: for order 0.80 here, because some pairs
    # of speeds have no order.
    c.loss.weights = ml_collections.ConfigDict()
    c.loss.weights.vv = 0.5
    c.loss.weights.va = 1.0
    c.loss.weights.aa = 0.5
    c.loss.weights.speed_video = 0.5
    c.loss.weights.speed_audio = 0.5
    c.loss.weights.direction_video = 0.5
    c.loss.weights.direction_audio = 0.5
    c.loss.weights.order_vv = 0.5
    c.loss.weights.order_aa = 0.5
    c.loss.weights.order_va = 0.5

    c.bank = ml_collections.ConfigDict()
    c.bank.size = 256  # rows, two per video; 0 switches the bank off
    c.bank.dtype = "float32"
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
    c.bank.warmup_steps = 900
    # Labels whose agreement between anchors and sampled rows is logged, beside the base rate.
    c.bank.health_labels = ("motion", "material")

    c.optimizer = ml_collections.ConfigDict()
    # Or "sgd", with other values: 300 steps of the demo (seed 0) reach a loss of 8.3 with learning
    # rate 0.1 and weight decay 1e-4, and of 8.9 with the values below.
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.1
    c.optimizer.momentum = 0.9
    c.optimizer.beta2 = 0.98
    c.optimizer.clip_norm = 5.0
    # Above 0, the average of parameters and running statistics over about 1 / (1 - ema_decay) steps
    # is kept, exported and evaluated: untested.
    c.optimizer.ema_decay = 0.0

    training.devices(c)
    c.log_every = 50
    c.checkpoint_every = 500
    c.keep_checkpoints = 2
    return c


def _encoders(model: ml_collections.ConfigDict) -> None:
    """Sets the sections `video` and `audio` of a model.

    A general name reads the section of that name, here of the demo's size; the demo trains those
    named `resnet`, the others were not trained. A published name (docs/encoders.md) reads none.
    """
    v = model.video = ml_collections.ConfigDict()
    v.name = "resnet"
    v.subtract_time_mean = True
    v.lowering = "auto"
    v.resnet = ml_collections.ConfigDict()
    v.resnet.widths = (24, 48, 96)
    v.resnet.depths = (0, 1, 1)
    v.resnet.factorisation = "r2plus1d_plain"
    v.resnet.stem = "patch4"
    v.resnet.block = "basic"
    v.resnet.pool = "mean"
    v.inception = ml_collections.ConfigDict()
    v.inception.width = 0.25
    v.inception.gating = False
    v.transformer = ml_collections.ConfigDict()
    v.transformer.width = 96
    v.transformer.depth = 4
    v.transformer.heads = 4
    v.transformer.tubelet = (2, 8, 8)
    v.transformer.attention = "factorised"

    a = model.audio = ml_collections.ConfigDict()
    a.name = "resnet"
    a.resnet = ml_collections.ConfigDict()
    a.resnet.widths = (32, 64, 128)
    a.resnet.depths = (1, 1, 1)
    a.resnet.stem = "patch"
    a.resnet.patch = (2, 4)
    a.convnet = ml_collections.ConfigDict()
    a.convnet.widths = (32, 64, 128)
    a.convnet.pool = "max"
    a.transformer = ml_collections.ConfigDict()
    a.transformer.width = 96
    a.transformer.depth = 4
    a.transformer.heads = 4
    a.transformer.patch = (4, 8)


def abstract() -> ml_collections.ConfigDict:
    """The demo with the contrastive terms of the paper's abstract: video-video and video-audio.

    python -m avcl_jax.main --config=configs/pretrain.py:abstract

    Hardware: as the demo. The demo's third term, audio-audio, is ours; in other presets,
    `--config.loss.weights.aa=0` switches it off.
    """
    c = demo()
    c.name = "abstract"
    c.loss.weights.aa = 0.0
    return c


def records() -> ml_collections.ConfigDict:
    """Your own records, at the size of the demo.

    python -m avcl_jax.main --config=configs/pretrain.py:records --config.data.directory=data/mine

    Hardware: as the demo. The run is named after the directory of the records; without --workdir it
    goes to runs/NAME.
    """
    c = demo()
    c.name = ""
    c.data.make_demo = False
    c.data.directory = ""
    c.bank.health_labels = ()
    return c


def esc10() -> ml_collections.ConfigDict:
    """ESC-10, sound alone: 5 s recordings, of which a test fold is left out.

    python -m avcl_jax.main --config=configs/pretrain.py:esc10 --config.data.select='fold!=1' \\
        --workdir=runs/esc10/seed0/fold1

    Hardware: 2 CPU cores, under 8 minutes. `python -m benchmarks.esc10` runs all folds and seeds;
    figures are in docs/reproduction.md. All is as in the demo but what sound alone has no use for,
    and the highest speed, at which a recording is too short for two views.
    """
    c = demo()
    c.name = "esc10"
    c.steps = 2000
    c.modalities = "audio"
    c.data.make_demo = False
    c.data.directory = "data/esc10"
    c.data.split = "all"
    c.views.speeds = (1, 2, 4)
    c.loss.weights.aa = 1.0
    c.bank.warmup_steps = 1200
    c.bank.health_labels = ()
    c.checkpoint_every = 1000
    c.keep_checkpoints = 1
    return c


def _full_size(name: str, *, batch: int, steps: int) -> ml_collections.ConfigDict:
    """Settings shared by the full-size presets: R(2+1)D-18, audio ResNet, 16 x 112^2, bfloat16.

    No run of this size has been done. Each scientific value has its reason beside it, or "untested"
    without one. The values of AVID-CMA, GDT, CrissCross and BraVe, with file and line, are in
    docs/reproduction.md, "Settings beside those of relatives".
    """
    c = demo()
    c.name = name
    c.steps = steps  # 200 epochs, as GDT; 50 of AudioSet, which is five to ten times as large
    c.global_batch_size = batch  # 512 as BraVe, 2,048 as CrissCross
    c.data.make_demo = False
    c.data.directory = f"data/{name}"
    c.data.workers = 32  # each with one thread was fastest: docs/data/pipeline_speed.md
    c.data.threads = 1
    c.data.prefetch = 2

    c.views.num_frames = 16  # as BraVe; R(2+1)D-18's FLOPs are published for this input
    # At 0.75 s two views of a 10 s video fit in every order for all pairs of speeds but (8, 8), at
    # 1.0 s for 11 of 16. Clips have 21.3 frames/s; videos under 0.45 of that (9.6) have no speed
    # task. Relatives: 0.5 to 1.3 s of video, 1 to 10 s of audio.
    c.views.clip_seconds = 0.75
    # Inherited and untested: speeds (1, 2, 4, 8); one playback for video and audio. No relative
    # varies the speed.
    c.crop.image_size = 112  # as GDT and CrissCross
    # As BraVe. The smallest crop of a 128-pixel record is 70 pixels wide, enlarged 1.6 times; the
    # 0.08 of AVID-CMA and CrissCross, 36 pixels, requires larger records (--short-side).
    c.crop.min_area = 0.3
    c.crop.quarter_turns = False  # real cameras have an upright
    c.photometric.brightness = 0.125  # added, as BraVe's; the others multiply by 0.6 to 1.4
    c.photometric.contrast = 0.4  # these two as all four relatives
    c.photometric.saturation = 0.4
    c.photometric.hue = 0.2  # as AVID-CMA, CrissCross, BraVe
    # Inherited: gray_probability 0.2, as CrissCross and BraVe; flips, as all; pixel mean 0.5 and
    # deviation 0.25, near GDT's 0.45 and 0.225.

    # Windows do not overlap at any speed, so more windows are shorter and resolve fewer bands: 24
    # of 500 samples (31 ms; relatives 7 to 64 ms) resolve 80 independent bands, the demo's 250
    # samples 66 of 80. The step in time is larger than any relative's (3 to 10 ms): untested.
    c.spectrogram.frames = 24
    c.spectrogram.mels = 80  # as CrissCross and BraVe
    # Inherited: 16 kHz, as CrissCross; 60 to 7,600 Hz, BraVe from 80; mean -7, as
    # CrissCross's -5.37 for windows of 1,024 is -6.80 for 500 (power grows with the window's
    # square); std 3 and floor 1e-6 untested.
    c.spectrogram.where = "device"
    c.spectral.mask_mels = 12  # 15 % of the bands, as in the demo; GDT 8, CrissCross twice 13 %
    # Inherited and untested: equalizer and noise. Relatives scale the volume by up to 10 or 20 %;
    # here the mean level is kept, because loudness is evidence of temporal order.

    c.model.dtype = "bfloat16"
    c.model.projection_hidden = 512  # as AVID-CMA and GDT; inherited embedding_dim 128, as AVID-CMA
    c.model.temporal_hidden = 512  # untested: no relative has these heads
    c.model.video.name = "r2plus1d_18"  # both as GDT
    c.model.video.subtract_time_mean = False
    c.model.audio.name = "resnet_9"

    # Inherited and untested: temperature 0.1 (AVID-CMA, GDT: 0.07) and weights. At the start,
    # when every loss is the logarithm of its number of choices, contrastive terms are 13.9 of the
    # total and temporal tasks at most 3.7. The audio-audio term is ours:
    # `--config.loss.weights.aa=0` trains by the abstract.
    c.loss.positive_weight = 0.1  # untested; AVID-CMA: half, in a loss of its own
    # Rows of the last 64 steps, 7 to 18 % of the videos. Untested.
    c.bank.size = 128 * batch
    c.bank.dtype = "bfloat16"
    # The next five are untested. AVID-CMA uses the 32 nearest rows as positives, and 64 (within) or
    # 1,024 (across) of all others as negatives.
    c.bank.num_positives = 8
    c.bank.positive_window = 1 / 2048  # 32 of 65,536 rows
    c.bank.num_negatives = 256
    c.bank.negative_candidates = 2048
    c.bank.negative_offset = 0.02  # above the 0.25 % of Kinetics-400 that share a class
    # Positives are as good as the features that select them; the learning rate is then at 0.54 to
    # 0.6 of its peak. AVID-CMA: after 30 of 50 epochs, on AudioSet 40 of 80.
    c.bank.warmup_steps = steps // 2
    # Inherited: space "agreement", AVID-CMA's "consensus". Inherited and untested: ranking,
    # distributions, temperature.
    c.bank.health_labels = ()

    # Relatives with Adam: 1e-4 to 5e-4 for batches of 160 per node to 2,048. Scaled with the square
    # root of the batch, the rule for adaptive optimizers (Malladi et al. 2022, arXiv 2205.10287).
    # Untested.
    c.optimizer.learning_rate = 5e-4 * (batch / 512) ** 0.5
    c.optimizer.warmup_steps = 5_000  # as BraVe; 10 epochs of Kinetics-400, as GDT
    c.optimizer.beta2 = 0.999  # as AVID-CMA, CrissCross; the demo's 0.98 averages over 50 steps
    # Inherited: momentum 0.9, as all; weight_decay 0.1, decoupled, untested: its time constant is
    # at most 20,000 steps at the peak rate (docs/reproduction.md has the relatives' L2); clip_norm
    # 5, untested, no relative clips; ema_decay 0, as all: the cosine ends at 0, so an average over
    # the last 1,000 steps, at under 0.2 % of the peak rate, would equal the last parameters.
    c.log_every = 100
    c.checkpoint_every = 2_000
    c.keep_checkpoints = 3
    return c


def kinetics400() -> ml_collections.ConfigDict:
    """Kinetics-400, 246,000 clips of 10 s, 200 epochs.

    python -m avcl_jax.main --config=configs/pretrain.py:kinetics400 --workdir=gs://bucket/k400

    Hardware meant: TPU v5e-32 or 8 GPUs of 80 GB. Verified here: the config builds, its state
    shapes evaluate and its step lowers (tests/test_configs.py). Not run: no training of this size
    has been done with this code, so there is no accuracy to expect yet.
    """
    c = _full_size("kinetics400", batch=512, steps=96_000)
    c.bank.health_labels = ("class",)
    return c


def kinetics600() -> ml_collections.ConfigDict:
    """Kinetics-600, 392,000 clips of 10 s, 200 epochs.

    python -m avcl_jax.main --config=configs/pretrain.py:kinetics600 --workdir=gs://bucket/k600

    Hardware meant: TPU v5e-64 or 16 GPUs of 80 GB. Verified and not run: as kinetics400.
    """
    c = _full_size("kinetics600", batch=1024, steps=76_500)
    c.bank.health_labels = ("class",)
    return c


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound, 184,000 training clips of 10 s whose audio source is visible, 200 epochs.

    python -m avcl_jax.main --config=configs/pretrain.py:vggsound --workdir=gs://bucket/vggsound

    Hardware meant: TPU v5e-32 or 8 GPUs of 80 GB. Verified and not run: as kinetics400.
    """
    c = _full_size("vggsound", batch=512, steps=72_000)
    c.loss.weights.va = 1.5  # because audio sources are visible; untested
    c.bank.health_labels = ("class",)
    return c


def audioset() -> ml_collections.ConfigDict:
    """AudioSet, about 1.9 million clips of 10 s, 50 epochs; several labels per clip.

    python -m avcl_jax.main --config=configs/pretrain.py:audioset --workdir=gs://bucket/audioset

    Hardware meant: TPU v5e-128 or 32 GPUs of 80 GB. Verified and not run: as kinetics400.
    """
    return _full_size("audioset", batch=2048, steps=46_000)
