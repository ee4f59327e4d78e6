"""Recognition by fine-tuning an encoder on labels.

    python -m avcl_jax.main --config=configs/finetune.py
    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400 \\
        --workdir=runs/ucf101
    python -m avcl_jax.main --config=configs/finetune.py --config.init=random --workdir=runs/scratch

`encoder` is the workdir of a pretraining run, an export, or imported PyTorch weights;
`init=random` trains the same architecture from scratch. configs/linear_probe.py probes it frozen.
docs/protocols/action_recognition.md says how figures are made.
"""

from __future__ import annotations

import ml_collections

from configs import training
from configs.presets import choose


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """The config of a preset: demo, demo_audio, or that of a benchmark."""
    return choose(preset, demo, demo_audio, ucf101, hmdb51, kinetics400, esc50, esc10, vggsound)


def demo() -> ml_collections.ConfigDict:
    """Motion of the demo's videos, from the encoder of `make demo`.

    python -m avcl_jax.main --config=configs/finetune.py

    Hardware: 2 CPU cores. Figures: docs/protocols/action_recognition.md.
    """
    c = ml_collections.ConfigDict()
    c.task = "finetune"
    c.name = "demo_finetune"
    c.seed = 0
    # Where splits are tested with an encoder each: 'runs/fold{fold}', the fold of data.test_select.
    c.encoder = "runs/demo"
    c.init = "pretrained"  # or "random": the same architecture, from scratch
    c.modality = "video"  # or "audio"

    c.data = ml_collections.ConfigDict()
    c.data.directory = "data/foley/records"
    c.data.label = "motion"
    c.data.train_split = "train"
    c.data.test_split = "test"
    # One entry a split of the benchmark: LABEL=VALUE, LABEL=VALUE|VALUE, LABEL!=VALUE; "" is all.
    c.data.train_select = ("",)
    c.data.test_select = ("",)
    c.data.allow_trained_on = False  # test on records that the encoder met in pretraining
    c.data.leave_out = False  # True leaves out records without the class or the modality
    c.data.workers = 0  # processes; 0 renders in threads, which suits few cores
    c.data.threads = 2
    c.data.prefetch = 4  # batches kept ready

    # 0: as the encoder was trained. Positions of a transformer are interpolated for other sizes.
    c.clip = ml_collections.ConfigDict()
    c.clip.seconds = 3.0  # the encoder saw 0.75, 1.5, 3 and 6 s, as its four speeds
    c.clip.num_frames = 0
    c.clip.image_size = 0

    training.demo_augmentation(c)  # crop, photometric, spectral: as in pretraining

    c.model = ml_collections.ConfigDict()
    c.model.dtype = "float32"
    c.model.remat = "none"  # "norms" or "blocks" save memory: docs/large_batches.md
    # Beginnings of paths of the encoder's parameters that are not trained: "encoder/stem".
    c.freeze = ()
    c.batch_norm = "train"  # or "frozen": the encoder's stays in evaluation mode

    c.head = ml_collections.ConfigDict()
    c.head.dropout = 0.2

    c.epochs = 30.0  # an epoch shows one clip of every record
    c.global_batch_size = 32
    c.label_smoothing = 0.1

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.name = "adamw"  # or "sgd", with a learning rate of its own: untested here
    c.optimizer.schedule = "cosine"  # or "multistep"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_epochs = 2.0
    c.optimizer.milestones = ()  # epochs at which a multistep schedule falls, by `factor`
    c.optimizer.factor = 1.0
    c.optimizer.head_factor = 3.0  # the head's learning rate over the encoder's
    c.optimizer.head_epochs = 0.0  # the head trains alone for so many epochs
    c.optimizer.weight_decay = 0.05
    c.optimizer.momentum = 0.9
    c.optimizer.beta2 = 0.999
    c.optimizer.clip_norm = 5.0

    c.test = ml_collections.ConfigDict()
    c.test.clips = 10
    c.test.crops = 1  # 3: along the longer side, the field's 10 x 3
    c.test.chunk = 16  # records in a call

    c.bootstrap = ml_collections.ConfigDict()
    c.bootstrap.resamples = 2000

    training.devices(c)
    c.log_every = 20
    c.checkpoint_every = 200
    c.keep_checkpoints = 1
    return c


def demo_audio() -> ml_collections.ConfigDict:
    """Material of the demo's sounds, from the audio encoder of `make demo`.

    python -m avcl_jax.main --config=configs/finetune.py:demo_audio

    Hardware and figures: as demo.
    """
    c = demo()
    c.name = "demo_audio_finetune"
    c.modality = "audio"
    c.data.label = "material"
    c.clip.seconds = 0.0
    return c


def _full_size(name: str) -> ml_collections.ConfigDict:
    """What the video benchmarks share: 32 frames of 2 s at 112 pixels, bfloat16."""
    c = demo()
    c.name = f"{name}_finetune"
    c.encoder = "runs/kinetics400"
    c.data.directory = f"data/{name}"
    c.data.label = "class"
    c.data.workers = 32
    c.data.threads = 1
    c.data.prefetch = 2
    # 2 s at 16 pictures/s: AVID-CMA and CrissCross. They crop 224 pixels of larger pictures, GDT
    # 128 (eval_video.py; 112 in pretraining); records hold 128 unless prepared otherwise.
    c.clip.seconds = 2.0
    c.clip.num_frames = 32
    c.clip.image_size = 112
    # AVID-CMA, configs/benchmark/ucf/32at16-fold2.yaml: "msc+color", min_area 0.08.
    c.crop.min_area = 0.08
    c.crop.quarter_turns = False
    c.photometric.brightness = 0.4
    c.photometric.contrast = 0.4
    c.photometric.saturation = 0.4
    c.photometric.hue = 0.2
    c.photometric.gray_probability = 0.0
    c.model.dtype = "bfloat16"
    c.head.dropout = 0.5
    c.label_smoothing = 0.0
    c.global_batch_size = 32
    c.optimizer.schedule = "multistep"
    c.optimizer.learning_rate = 1e-4  # Adam, as below
    c.optimizer.warmup_epochs = 0.0
    c.optimizer.factor = 0.3
    c.optimizer.head_factor = 1.0
    c.optimizer.weight_decay = 0.0  # AdamW without decay is Adam
    c.optimizer.clip_norm = 0.0
    c.test.chunk = 8
    c.log_every = 100
    c.checkpoint_every = 2_000
    return c


def _three_splits(c: ml_collections.ConfigDict) -> None:
    """The official splits of UCF101 and HMDB51: labels of one prepared directory."""
    c.data.train_split = c.data.test_split = "all"
    c.data.train_select = ("split1=train", "split2=train", "split3=train")
    c.data.test_select = ("split1=test", "split2=test", "split3=test")


def ucf101() -> ml_collections.ConfigDict:
    """UCF101, three official splits; prepare it as docs/data/ucf101.md says.

    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400 \
        --workdir=runs/ucf101

    Schedule of AVID-CMA (Morgado et al., CVPR 2021; facebookresearch/AVID-CMA,
    configs/benchmark/ucf/32at16-fold2.yaml and eval-action-recg.py): Adam 1e-4, batch 32, the
    classifier alone for 5 of its epochs, then 16 epochs with falls by 0.3 at 6, 10 and 14, dropout
    0.5. Its epoch draws 5 clips of each video, ours one, so all numbers are five times theirs; it
    restarts the optimizer after the classifier's epochs, which this does not. It reports the epoch
    after the last, and 10 clips.

    Hardware meant: 1 GPU of 80 GB or TPU v5e-8. Verified here: the config builds, records of the
    same labels train and are tested (tests/evaluation/test_finetune.py). Not run on UCF101.
    """
    c = _full_size("ucf101")
    _three_splits(c)
    c.epochs = 105.0
    c.optimizer.head_epochs = 25.0
    c.optimizer.milestones = (55.0, 75.0, 95.0)
    return c


def hmdb51() -> ml_collections.ConfigDict:
    """HMDB51, three official splits; prepare it as docs/data/hmdb51.md says.

    python -m avcl_jax.main --config=configs/finetune.py:hmdb51 --config.encoder=runs/k400 \
        --workdir=runs/hmdb51

    Schedule of AVID-CMA (configs/benchmark/hmdb51/32at16-fold3.yaml): as ucf101, but 10 epochs of
    10 clips with falls at 3, 6 and 8, and colour jitter up to 1.0. Hardware, verified: as ucf101.
    """
    c = _full_size("hmdb51")
    _three_splits(c)
    c.photometric.brightness = 1.0
    c.photometric.contrast = 1.0
    c.photometric.saturation = 1.0
    c.epochs = 150.0
    c.optimizer.head_epochs = 50.0
    c.optimizer.milestones = (80.0, 110.0, 130.0)
    return c


def kinetics400() -> ml_collections.ConfigDict:
    """Kinetics-400, trained on train, tested on val; prepare it as docs/data/kinetics.md says.

    python -m avcl_jax.main --config=configs/finetune.py:kinetics400 --config.encoder=runs/k400 \
        --workdir=runs/k400_finetuned

    Schedule of R(2+1)D (Tran et al., CVPR 2018; facebookresearch/VMZ,
    scripts/train_r2plus1d_kinetics.sh): SGD 0.01 for a batch of 32, falling by 0.1, weight decay
    1e-4. Its 35 million clips are 140 epochs of one clip, for training from scratch; here 45, with
    falls at 20, 30 and 40, and the learning rate scaled to the batch.

    Hardware meant: 8 GPUs of 80 GB or TPU v5e-32. Not run.
    """
    c = _full_size("kinetics400")
    c.data.train_split, c.data.test_split = "train", "val"
    c.clip.num_frames = 16
    c.clip.seconds = 1.0
    c.crop.min_area = 0.3
    c.head.dropout = 0.2
    c.global_batch_size = 256
    c.epochs = 45.0
    c.optimizer.name = "sgd"
    c.optimizer.learning_rate = 0.08
    c.optimizer.warmup_epochs = 5.0
    c.optimizer.milestones = (20.0, 30.0, 40.0)
    c.optimizer.factor = 0.1
    c.optimizer.weight_decay = 1e-4
    return c


def _audio(name: str) -> ml_collections.ConfigDict:
    c = _full_size(name)
    c.modality = "audio"
    c.clip.num_frames = 0
    c.clip.image_size = 0
    return c


def esc50() -> ml_collections.ConfigDict:
    """ESC-50, its five folds; prepare it as docs/data/esc50.md says.

    python -m avcl_jax.main --config=configs/finetune.py:esc50 --config.encoder=runs/audioset \
        --workdir=runs/esc50_finetuned

    Schedule after AST (Gong et al., Interspeech 2021; YuanGongND/ast, egs/esc50/run_esc.sh): Adam
    1e-4, batch 48, 35 epochs of whole 5 s files with masked bands. Here the rate falls as a cosine,
    the last epoch is reported, and clips are 2 s, so epochs are three times as many.

    Hardware meant: 1 GPU. Not run on all of ESC-50.
    """
    c = _audio("esc50")
    c.data.train_split = c.data.test_split = "all"
    folds = "12345"
    c.data.train_select = tuple(f"fold!={fold}" for fold in folds)
    c.data.test_select = tuple(f"fold={fold}" for fold in folds)
    c.data.workers = 8
    c.clip.seconds = 2.0
    c.spectral.mask_mels = 10
    c.global_batch_size = 48
    c.epochs = 105.0
    c.label_smoothing = 0.1
    c.optimizer.schedule = "cosine"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_epochs = 5.0
    c.optimizer.head_factor = 10.0
    c.optimizer.weight_decay = 0.05
    return c


def esc10() -> ml_collections.ConfigDict:
    """ESC-10, its five folds, for an encoder of the demo's size.

    python -m avcl_jax.main --config=configs/finetune.py:esc10 \\
        --config.encoder='runs/esc10/seed0/fold{fold}' --workdir=runs/esc10_finetuned

    As esc50 but for the learning rate, which is the demo's, and fewer epochs, chosen for their
    time. Hardware: 2 CPU cores. Figures: docs/protocols/action_recognition.md.
    """
    c = esc50()
    c.name = "esc10_finetune"
    c.data.directory = "data/esc10"
    c.data.workers = 0
    c.data.threads = 2
    c.data.prefetch = 4
    c.model.dtype = "float32"
    c.epochs = 60.0
    c.optimizer.learning_rate = 1e-3
    c.log_every = 20
    c.checkpoint_every = 200
    return c


def vggsound() -> ml_collections.ConfigDict:
    """VGG-Sound's 309 classes from sound; prepare it as docs/data/vggsound.md says.

    python -m avcl_jax.main --config=configs/finetune.py:vggsound --config.encoder=runs/vggsound \
        --workdir=runs/vggsound_finetuned

    The schedule is our choice: no relative fine-tunes on it. Hardware meant: 1 GPU. Not run.
    """
    c = _audio("vggsound")
    c.data.train_split, c.data.test_split = "train", "test"
    c.clip.seconds = 5.0
    c.head.dropout = 0.2
    c.global_batch_size = 256
    c.epochs = 30.0
    c.label_smoothing = 0.1
    c.optimizer.schedule = "cosine"
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_epochs = 2.0
    c.optimizer.head_factor = 10.0
    c.optimizer.weight_decay = 0.05
    return c
