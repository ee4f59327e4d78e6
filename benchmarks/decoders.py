"""Bound of the input pipeline: the speed of JPEG decoders on the frames that it decodes."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import multiprocessing
import multiprocessing.synchronize
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg

from benchmarks import rendering
from benchmarks.measure import seconds_in_turns, seconds_of

Decoder = Callable[[bytes], Any]


def _simplejpeg() -> Decoder:
    # Into memory that is already mapped: the bound contains nothing but decoding.
    memory = np.empty((1024, 1024, 3), np.uint8)
    return lambda frame: simplejpeg.decode_jpeg(frame, colorspace="RGB", buffer=memory)


def _opencv() -> Decoder:
    import cv2

    cv2.setNumThreads(0)
    return lambda frame: cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR_RGB)


def _imagecodecs() -> Decoder:
    import imagecodecs

    return imagecodecs.jpeg8_decode


def _pillow() -> Decoder:
    import io

    from PIL import Image

    return lambda frame: np.asarray(Image.open(io.BytesIO(frame)))


def _tensorflow() -> Decoder:
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    decode = tf.io.decode_jpeg
    return lambda frame: decode(frame, channels=3, dct_method="INTEGER_ACCURATE").numpy()


# Name -> package and decoder. All use the accurate DCT and smooth upsampling of the pipeline, and
# so give the same pixels.
DECODERS: dict[str, tuple[str, Callable[[], Decoder]]] = {
    "simplejpeg": ("simplejpeg", _simplejpeg),
    "opencv": ("cv2", _opencv),
    "imagecodecs": ("imagecodecs", _imagecodecs),
    "pillow": ("PIL", _pillow),
    "tensorflow": ("tensorflow", _tensorflow),
}


def _concatenate(samples: Sequence[list[bytes]]) -> list[bytes]:
    return list(itertools.chain.from_iterable(samples))


def _decode_all(decode: Decoder, frames: Sequence[bytes]) -> None:
    for frame in frames:
        decode(frame)


def compare(*, directory: str, samples: int, repeats: int) -> dict[str, Any]:
    """Times every installed decoder on one core, in turns.

    Returns:
        By decoder: median `microseconds` per frame and `same_pixels`, true if its pixels are those
        of the pipeline; or `absent`, the reason why it cannot be used.
    """
    frames = _concatenate(rendering.decoded_frames(directory, samples=samples))
    decoders: dict[str, Decoder] = {}
    result: dict[str, Any] = {}
    for name, (package, make) in DECODERS.items():
        if importlib.util.find_spec(package) is None:
            result[name] = {"absent": f"{package} is not installed"}
        else:
            decoders[name] = make()
    calls = {name: functools.partial(_decode_all, each, frames) for name, each in decoders.items()}
    seconds = seconds_in_turns(calls, repeats=repeats)
    reference = _simplejpeg()
    for name, decode in decoders.items():
        result[name] = {
            "microseconds": round(1e6 * statistics.median(seconds[name]) / len(frames), 2),
            "same_pixels": all(
                np.array_equal(decode(frame), reference(frame)) for frame in frames[::37]
            ),
        }
    return result


def _decode_on(
    cpu: int, decoder: str, frames: Sequence[bytes], barrier: multiprocessing.synchronize.Barrier
) -> None:
    os.sched_setaffinity(0, {cpu})
    decode = DECODERS[decoder][1]()
    _decode_all(decode, frames[:100])
    barrier.wait()
    _decode_all(decode, frames)
    barrier.wait()


def decode_rate(*, directory: str, samples: int, decoder: str) -> float:
    """Samples per second of decoding alone, from memory, by one process on each core.

    Args:
        samples: number of samples of the pipeline whose frames are decoded.
        decoder: key of `DECODERS`.
    """
    frames = rendering.decoded_frames(directory, samples=samples)
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(cores) + 1)
    processes = []
    for number, cpu in enumerate(cores):
        of_core = _concatenate(frames[number :: len(cores)])
        processes.append(context.Process(target=_decode_on, args=(cpu, decoder, of_core, barrier)))
        processes[-1].start()
    barrier.wait()
    seconds = seconds_of(barrier.wait)
    for process in processes:
        process.join()
    return samples / seconds
