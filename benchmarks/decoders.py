"""The bound of the input pipeline: how fast JPEG decoders alone decode the frames it decodes."""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.synchronize
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg

from benchmarks import rendering

# The one the pipeline uses.
OURS = "simplejpeg"
Decoder = Callable[[bytes], Any]


def _simplejpeg() -> Decoder:
    # Memory that is already there: a bound pays for nothing but decoding.
    memory = np.empty((1024, 1024, 3), np.uint8)
    return lambda frame: simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=memory)


def _opencv() -> Decoder:
    import cv2

    cv2.setNumThreads(0)
    return lambda frame: cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR_RGB)


def _imagecodecs() -> Decoder:
    import imagecodecs

    return lambda frame: imagecodecs.jpeg8_decode(frame)


def _turbojpeg() -> Decoder:
    import turbojpeg

    jpeg = turbojpeg.TurboJPEG()
    return lambda frame: jpeg.decode(frame, pixel_format=turbojpeg.TJPF_RGB)


def _pillow() -> Decoder:
    import io

    from PIL import Image

    return lambda frame: np.asarray(Image.open(io.BytesIO(frame)))


def _tensorflow() -> Decoder:
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    decode = tf.io.decode_jpeg
    return lambda frame: decode(frame, channels=3, dct_method="INTEGER_ACCURATE").numpy()


# All with the accurate DCT and smooth upsampling that the pipeline uses: same pixels.
DECODERS: dict[str, tuple[str, Callable[[], Decoder]]] = {
    "simplejpeg": ("simplejpeg", _simplejpeg),
    "opencv": ("cv2", _opencv),
    "imagecodecs": ("imagecodecs", _imagecodecs),
    "pyturbojpeg": ("turbojpeg", _turbojpeg),
    "pillow": ("PIL", _pillow),
    "tensorflow": ("tensorflow", _tensorflow),
}


def compare(*, directory: str, samples: int, repeats: int) -> dict[str, Any]:
    """Times every installed decoder on one core, in turns.

    Args:
        directory: prepared records.
        samples: of the pipeline, whose frames are decoded.
        repeats: measurements of each.

    Returns:
        By decoder: `microseconds` a frame (median), whether its pixels are `same_pixels` as those
        of the pipeline; or `absent`, why it could not be used.
    """
    frames = [
        frame
        for sample in rendering.decoded_frames(rendering.open_records(directory), samples=samples)
        for frame in sample
    ]
    reference = _simplejpeg()
    usable: dict[str, Decoder] = {}
    result: dict[str, Any] = {}
    for name, (package, make) in DECODERS.items():
        if importlib.util.find_spec(package) is None:
            result[name] = {"absent": f"{package} is not installed"}
            continue
        try:
            usable[name] = make()
        except RuntimeError as error:  # PyTurboJPEG without the system's library
            result[name] = {"absent": str(error).splitlines()[0]}
    times: dict[str, list[float]] = {name: [] for name in usable}
    for _ in range(repeats):
        for name, decode in usable.items():
            begin = time.perf_counter()
            for frame in frames:
                decode(frame)
            times[name].append((time.perf_counter() - begin) / len(frames))
    for name, decode in usable.items():
        same = all(np.array_equal(decode(frame), reference(frame)) for frame in frames[::37])
        microseconds = round(1e6 * statistics.median(times[name]), 2)
        result[name] = {"microseconds": microseconds, "same_pixels": same}
    return result


def _decode_share(
    decoder: str,
    frames: Sequence[bytes],
    barrier: multiprocessing.synchronize.Barrier,
    cpu: int,
) -> None:
    os.sched_setaffinity(0, {cpu})
    decode = DECODERS[decoder][1]()
    for frame in frames[:100]:
        decode(frame)
    barrier.wait()
    for frame in frames:
        decode(frame)
    barrier.wait()


def decode_rate(*, directory: str, samples: int, decoder: str) -> float:
    """Samples per second of decoding alone, by one process on each core.

    Args:
        directory: prepared records.
        samples: of the pipeline, whose frames are decoded, held in memory.
        decoder: of `DECODERS`.
    """
    chosen = rendering.decoded_frames(rendering.open_records(directory), samples=samples)
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(cores) + 1)
    processes = []
    for number, cpu in enumerate(cores):
        share = [frame for sample in chosen[number :: len(cores)] for frame in sample]
        process = context.Process(target=_decode_share, args=(decoder, share, barrier, cpu))
        process.start()
        processes.append(process)
    barrier.wait()
    begin = time.perf_counter()
    barrier.wait()
    seconds = time.perf_counter() - begin
    for process in processes:
        process.join()
    return samples / seconds
