"""Writes the record files in this folder, by TensorFlow and TFDS themselves.

    pip install -r requirements-interop.txt
    python tests/data_prep/testdata/make_with_tensorflow.py

The files are checked in, so that the default tests read what TensorFlow wrote without having it.
`expected.npz` holds what went into them.
"""

from __future__ import annotations

import io
import shutil
import wave
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

HERE = Path(__file__).parent
HEIGHT, WIDTH, FRAMES, RATE = 24, 32, 5, 2000
ACTIONS, SOUNDS = ["fall", "roll", "spin"], ["bell", "wind"]


def picture(number: int, frame: int) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3], that moves."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    shift = 7 * frame + 31 * number
    channels = (rows * 8 + shift, columns * 6 - shift + 60, (rows + columns) * 4 - shift + 60)
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


def jpegs(number: int) -> list[bytes]:
    return [tf.io.encode_jpeg(picture(number, f), quality=80).numpy() for f in range(FRAMES)]


def pngs(number: int) -> list[bytes]:
    return [tf.io.encode_png(picture(number, f)).numpy() for f in range(FRAMES)]


def samples(number: int) -> np.ndarray:
    """int16 [samples]: as long as the picture at 10 frames a second."""
    time = np.arange(FRAMES * RATE // 10) / RATE
    return (12000 * np.sin(2 * np.pi * (100 + 50 * number) * time)).astype(np.int16)


def wav(number: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(samples(number).astype("<i2").tobytes())
    return file.getvalue()


class Tiny(tfds.core.GeneratorBasedBuilder):
    """What most audio-visual data sets of TFDS look like."""

    VERSION = tfds.core.Version("1.0.0")

    def features(self) -> dict[str, object]:
        of = tfds.features
        return {
            "name": of.Text(),
            "clip": of.Video((None, HEIGHT, WIDTH, 3), encoding_format="jpeg"),
            "sound": of.Audio(sample_rate=RATE),
            "action": of.ClassLabel(names=ACTIONS),
            "heard": of.Sequence(of.ClassLabel(names=SOUNDS)),
        }

    def example(self, number: int) -> dict[str, object]:
        return {
            "name": f"clip {number}",
            "clip": list(map(io.BytesIO, jpegs(number))),
            "sound": samples(number).astype(np.int64),
            "action": number % 3,
            "heard": [[], [0], [0, 1], [1]][number],
        }

    def splits(self) -> dict[str, list[int]]:
        # Formats other than TFRecord take 128 KiB per file.
        is_tfrecord = self.info.file_format is tfds.core.FileFormat.TFRECORD
        return {"train": [0, 1, 2]} | ({"test": [3]} if is_tfrecord else {})

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: object) -> dict[str, object]:
        return {name: self._generate_examples(numbers) for name, numbers in self.splits().items()}

    def _generate_examples(self, numbers: list[int]) -> object:
        for number in numbers:
            yield number, self.example(number)


class Variants(Tiny):
    """One example with every other way in which TFDS keeps pictures and sound."""

    def features(self) -> dict[str, object]:
        of = tfds.features
        wav = {"file_format": "wav", "dtype": np.int32, "lazy_decode": True}
        packed = {"dtype": np.uint8, "encoding": "zlib"}
        return {
            "png": of.Video((None, HEIGHT, WIDTH, 3)),
            "images": of.Sequence(of.Image(encoding_format="jpeg")),
            "pixels": of.Tensor(shape=(None, HEIGHT, WIDTH, 3), dtype=np.uint8),
            "packed": of.Tensor(shape=(None, None, None, 3), **packed),
            "nested": {"stereo": of.Tensor(shape=(None, 2), dtype=np.float32)},
            "int16": of.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
            "listed": of.Sequence(np.float32),
            "wav": of.Audio(sample_rate=RATE, **wav),
            "grade": of.Scalar(np.int64),
            "embedding": of.Tensor(shape=(4,), dtype=np.float32),
        }

    def example(self, number: int) -> dict[str, object]:
        pixels = np.stack([picture(number, frame) for frame in range(FRAMES)])
        floats = samples(number) / np.float32(32768)
        return {
            "png": list(map(io.BytesIO, pngs(number))),
            "images": list(map(io.BytesIO, jpegs(number))),
            "pixels": pixels,
            "packed": pixels,
            "nested": {"stereo": np.stack([floats, -floats / 2], axis=-1)},
            "int16": samples(number),
            "listed": floats,
            "wav": io.BytesIO(wav(number)),
            "grade": 2,
            "embedding": np.zeros(4, np.float32),
        }

    def splits(self) -> dict[str, list[int]]:
        return {"train": [0]}


def sequence_example(
    number: int,
    *,
    floats: np.ndarray,
    context: dict[str, object],
    times: list[int] | None,
    packets: int = 1,
    channels: int = 1,
) -> bytes:
    """A clip as MediaSequence and DMVR write it."""
    example = tf.train.SequenceExample()
    kinds = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
    for key, value in context.items():
        values = value if isinstance(value, list) else [value]
        getattr(example.context.feature[key], kinds[type(values[0])]).value.extend(values)
    lists = example.feature_lists.feature_list
    for frame in jpegs(number):
        lists["image/encoded"].feature.add().bytes_list.value.append(frame)
    for time in times or ():
        lists["image/timestamp"].feature.add().int64_list.value.append(time)
    for packet in np.split(floats, packets):
        lists["WAVEFORM/feature/floats"].feature.add().float_list.value.extend(packet.tolist())
    if packets > 1 and times:
        # Packets follow each other without a gap, from the first frame on.
        for packet in range(packets):
            time = times[0] + packet * len(floats) * 1_000_000 // (packets * channels * RATE)
            lists["WAVEFORM/feature/timestamp"].feature.add().int64_list.value.append(time)
    return example.SerializeToString()


def write_sequence_examples() -> None:
    floats = [samples(n) / np.float32(32768) for n in range(3)]
    times = [5_000_000, 5_100_000, 5_150_000, 5_300_000, 5_400_000]
    film = {"WAVEFORM/feature/sample_rate": float(RATE), "clip/media_id": b"film"}
    first = {
        "example/id": b"first",
        "clip/start/timestamp": 5_000_000,
        "clip/label/index": [2],
        "clip/label/string": [b"spin"],
    }
    second = {
        "example/id": b"second",
        "WAVEFORM/feature/num_channels": 2,
        "clip/label/index": [2, 0],
        "clip/label/string": [b"spin", b"fall"],
    }
    stereo = np.stack([floats[1], -floats[1] / 2], axis=-1).ravel()
    packets = {"packets": 4, "channels": 2}
    with tf.io.TFRecordWriter(str(HERE / "media_sequence.tfrecord")) as writer:
        writer.write(sequence_example(0, floats=floats[0], times=times, context=film | first))
        context = film | second
        writer.write(sequence_example(1, floats=stereo, times=times, context=context, **packets))
    # As examples/generate_from_file.py of DMVR writes them: no times, no rates; and its sound is
    # 32-bit integers that it reads as if they were floats.
    wrong = (samples(1).astype(np.int64) << 16).astype("<i4").view("<f4")
    for name, sound in (("dmvr", floats), ("dmvr_s32le", [floats[0], wrong])):
        with tf.io.TFRecordWriter(str(HERE / f"{name}.tfrecord-00000-of-00001")) as writer:
            for number, waveform in enumerate(sound):
                context = {
                    "clip/label/index": number % 2,
                    "clip/label/text": ACTIONS[number % 2].encode(),
                    "video/filename": b"film.mp4",
                }
                writer.write(sequence_example(number, floats=waveform, times=None, context=context))


def main() -> None:
    for name in ("tiny", "tiny_array_record", "variants"):
        shutil.rmtree(HERE / name, ignore_errors=True)
    scratch = HERE / "scratch"
    for builder, file_format, name in (
        (Tiny, "tfrecord", "tiny"),
        (Tiny, "array_record", "tiny_array_record"),
        (Variants, "tfrecord", "variants"),
    ):
        made = builder(data_dir=scratch, file_format=file_format)
        made.download_and_prepare()
        shutil.move(made.data_dir, HERE / name)
        shutil.rmtree(scratch)
    write_sequence_examples()
    expected = {f"samples_{number}": samples(number) for number in range(4)}
    for number in range(4):
        for frame, data in enumerate(jpegs(number)):
            expected[f"jpeg_{number}_{frame}"] = np.frombuffer(data, np.uint8)
    expected["pixels"] = np.stack([picture(0, frame) for frame in range(FRAMES)])
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()
