"""Recognition by fine-tuning an encoder on labels.

    python -m avcl_jax.main --config=configs/finetune.py:ucf101 --config.encoder=runs/k400 \\
        --workdir=runs/ucf101
    python -m avcl_jax.main --config=configs/finetune.py --config.init=random --workdir=runs/scratch

`encoder` is the workdir of a pretraining run, an export, or imported PyTorch weights.
docs/protocols/action_recognition.md defines the protocol. `demo` explains each setting, `ucf101`
has its reasons; presets of other data sets are one of these with other settings.
"""

from ml_collections import ConfigDict

from avcl_jax import weights
from avcl_jax.configs import datasets
from avcl_jax.configs.common import Presets, choose, execution


def get_config(preset: str = "demo") -> ConfigDict:
    """Returns a preset: one of `PRESETS`, at the end of this file."""
    return choose(preset, PRESETS, data=datasets.labelled, name="{}_finetune")


def demo() -> ConfigDict:
    """Motion of the demo's videos, from the encoder of `make demo`.

    Hardware: 2 CPU cores. Results: docs/protocols/action_recognition.md.
    """
    c = ConfigDict(dict(task="avcl_jax.evaluation.finetune:finetune", seed=0))
    # Where splits are tested with an encoder each: 'runs/fold{fold}', the fold of data.test_select.
    c.encoder = weights.DEFAULT
    c.init = "pretrained"  # or "random": the same architecture, from scratch
    c.modality = "video"  # or "audio"
    c.data = datasets.labelled("demo")

    # 0: as the encoder was trained. Positions of a transformer are interpolated for other sizes.
    c.clip = dict(num_frames=0, image_size=0)
    c.clip.seconds = 3.0  # the encoder was trained on 0.75, 1.5, 3 and 6 s, as its four speeds
    # As in pretraining.
    c.crop = dict(min_area=0.75, flip=True, quarter_turns=True)
    c.photometric = dict(brightness=0.1, contrast=0.3, saturation=0.5, hue=0.5)
    c.photometric.update(gray_probability=0.2, per_frame=False)
    c.spectral = dict(equalizer=0.7, equalizer_knots=5, mask_mels=6, noise=0.15)

    c.update(model=dict(dtype="float32"), head=dict(dropout=0.2))
    # Beginnings of paths of the encoder's parameters that are not trained: "encoder/stem".
    c.freeze = ()
    c.batch_norm = "train"  # or "frozen": the encoder's stays in evaluation mode

    c.epochs = 30.0  # an epoch has one clip of every record
    c.update(global_batch_size=32, label_smoothing=0.1)
    c.optimizer = dict(learning_rate=1e-3, warmup_epochs=2.0, weight_decay=0.05)
    c.optimizer.update(momentum=0.9, beta2=0.999, clip_norm=5.0)
    c.optimizer.name = "adamw"  # or "sgd", with a learning rate of its own: untested here
    c.optimizer.schedule = "cosine"  # or "multistep", which falls by `factor` at these epochs:
    c.optimizer.update(milestones=(), factor=1.0)
    c.optimizer.head_factor = 3.0  # the head's learning rate over the encoder's
    c.optimizer.head_epochs = 0.0  # first epochs, in which the head trains alone

    c.test = dict(clips=10, crops=1)  # 3 crops: along the longer side, the field's 10 x 3
    c.bootstrap = dict(resamples=2000)
    c.execution = execution(workers=0, threads=2, chunk=16, part_records=1024, fsdp=1)
    c.execution.update(remat="none", log_every=20, checkpoint_every=200, keep_checkpoints=1)
    c.execution.writers = ()
    return c


def ucf101() -> ConfigDict:
    """UCF101, three official splits: docs/data/ucf101.md.

    Schedule of AVID-CMA (Morgado et al., CVPR 2021; facebookresearch/AVID-CMA,
    configs/benchmark/ucf/32at16-fold2.yaml and eval-action-recg.py): Adam 1e-4, batch 32, the
    classifier alone for 5 of its epochs, then 16 epochs with falls by 0.3 at 6, 10 and 14, dropout
    0.5. Its epoch draws 5 clips of each video, ours one, so all numbers are five times theirs; it
    restarts the optimizer after the classifier's epochs, which this does not.

    Intended hardware: 1 GPU of 80 GB or TPU v5e-8. Not run on UCF101; records with such labels
    train and are tested in tests/evaluation/test_finetune.py.
    """
    c = ConfigDict(dict(task="avcl_jax.evaluation.finetune:finetune", seed=0))
    c.update(encoder="runs/kinetics400", init="pretrained", modality="video")
    c.data = datasets.labelled("ucf101")

    # 2 s at 16 frames/s: AVID-CMA and CrissCross. They crop 224 pixels of larger frames, GDT 128
    # (eval_video.py; 112 in pretraining); records have 128 unless prepared otherwise.
    c.clip = dict(seconds=2.0, num_frames=32, image_size=112)
    # As AVID-CMA: "msc+color", min_area 0.08.
    c.crop = dict(min_area=0.08, flip=True, quarter_turns=False)
    c.photometric = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    c.photometric.update(gray_probability=0.0, per_frame=False)
    # Of the presets of audio, as in pretraining on the demo; untested.
    c.spectral = dict(equalizer=0.7, equalizer_knots=5, mask_mels=6, noise=0.15)

    c.update(model=dict(dtype="bfloat16"), freeze=(), batch_norm="train", head=dict(dropout=0.5))

    c.update(epochs=105.0, global_batch_size=32, label_smoothing=0.0)
    c.optimizer = dict(name="adamw", momentum=0.9, beta2=0.999, clip_norm=0.0)
    c.optimizer.update(learning_rate=1e-4, weight_decay=0.0)  # AdamW without decay is Adam
    c.optimizer.update(schedule="multistep", warmup_epochs=0.0, factor=0.3)
    c.optimizer.update(milestones=(55.0, 75.0, 95.0), head_factor=1.0, head_epochs=25.0)

    c.update(test=dict(clips=10, crops=1), bootstrap=dict(resamples=2000))
    c.execution = execution(workers=32, threads=1, chunk=8, part_records=1024, fsdp=1)
    c.execution.update(remat="none", log_every=100, checkpoint_every=2_000, keep_checkpoints=1)
    c.execution.writers = ()
    return c


# ESC-50, its five folds: docs/data/esc50.md. Schedule after AST (Gong et al., Interspeech 2021;
# YuanGongND/ast, egs/esc50/run_esc.sh): Adam 1e-4, batch 48, 35 epochs of whole 5 s files with
# masked bands. Here the rate falls as a cosine, the last epoch is reported, and clips are 2 s, so
# epochs are three times as many. Intended hardware: 1 GPU. Not run on all of ESC-50.
_ESC50 = {
    **{"modality": "audio", "clip.num_frames": 0, "clip.image_size": 0, "spectral.mask_mels": 10},
    **{"global_batch_size": 48, "label_smoothing": 0.1, "execution.workers": 8},
    **{"optimizer.schedule": "cosine", "optimizer.milestones": (), "optimizer.weight_decay": 0.05},
    **{"optimizer.warmup_epochs": 5.0, "optimizer.head_factor": 10.0, "optimizer.head_epochs": 0.0},
}
PRESETS: Presets = {
    "demo": (demo, {}),
    # Material of the demo's audio, from the audio encoder of `make demo`.
    "demo_audio": (demo, {"modality": "audio", "clip.seconds": 0.0}),
    # Your own records, with splits train and test, in clips as long as in pretraining:
    # `--config.encoder=runs/mine --config.data.directory=data/mine --config.data.label=LABEL`
    "records": (demo, {"clip.seconds": 0.0}),
    "ucf101": (ucf101, {}),
    # Three official splits: docs/data/hmdb51.md. Schedule of AVID-CMA
    # (configs/benchmark/hmdb51/32at16-fold3.yaml): 10 epochs of 10 clips with falls at 3, 6 and 8,
    # and colour jitter up to 1.
    "hmdb51": (
        ucf101,
        {"epochs": 150.0, "optimizer.head_epochs": 50.0}
        | {"optimizer.milestones": (80.0, 110.0, 130.0)}
        | {f"photometric.{name}": 1.0 for name in ("brightness", "contrast", "saturation")},
    ),
    # Trained on train, tested on val: docs/data/kinetics.md. Schedule of R(2+1)D (Tran et al., CVPR
    # 2018; facebookresearch/VMZ, scripts/train_r2plus1d_kinetics.sh): SGD 0.01 for a batch of 32,
    # falling by 0.1, weight decay 1e-4. Its 35 million clips are 140 epochs of one clip, for
    # training from scratch; here 45, with falls at 20, 30 and 40, and the learning rate scaled to
    # the batch. Intended hardware: 8 GPUs of 80 GB or TPU v5e-32. Not run.
    "kinetics400": (
        ucf101,
        {"epochs": 45.0, "global_batch_size": 256, "clip.seconds": 1.0, "clip.num_frames": 16}
        | {"crop.min_area": 0.3, "head.dropout": 0.2, "optimizer.name": "sgd"}
        | {"optimizer.learning_rate": 0.08, "optimizer.warmup_epochs": 5.0}
        | {"optimizer.milestones": (20.0, 30.0, 40.0), "optimizer.factor": 0.1}
        | {"optimizer.weight_decay": 1e-4, "optimizer.head_epochs": 0.0},
    ),
    "esc50": (ucf101, _ESC50),
    # Five folds, for encoders of the demo's size, `--config.encoder='runs/esc10/seed0/fold{fold}'`,
    # on 2 CPU cores: docs/protocols/action_recognition.md has results. The learning rate is the
    # demo's; the epochs were chosen for their time.
    "esc10": (
        ucf101,
        {**_ESC50, "epochs": 60.0, "model.dtype": "float32", "optimizer.learning_rate": 1e-3}
        | {"execution.workers": 0, "execution.threads": 2}
        | {"execution.log_every": 20, "execution.checkpoint_every": 200},
    ),
    # 309 classes from audio: docs/data/vggsound.md. The schedule is our choice: no relative
    # fine-tunes on it. Intended hardware: 1 GPU. Not run.
    "vggsound": (
        ucf101,
        {**_ESC50, "epochs": 30.0, "global_batch_size": 256, "clip.seconds": 5.0}
        | {"spectral.mask_mels": 6, "head.dropout": 0.2, "optimizer.learning_rate": 5e-4}
        | {"optimizer.warmup_epochs": 2.0, "execution.workers": 32},
    ),
}
