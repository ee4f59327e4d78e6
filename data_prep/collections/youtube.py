"""What Kinetics, VGG-Sound and AudioSet share: clips of YouTube videos, and how files are named."""

from __future__ import annotations

import argparse

from avcl_jax.paths import absolute_path


def add_arguments(parser: argparse.ArgumentParser, *, media: str, lists: str) -> None:
    """Declares where the files and the lists are.

    Args:
      parser: Of the collection's command.
      media: Name of the folder's argument.
      lists: Help of the lists.
    """
    parser.add_argument(
        "folder",
        metavar=media,
        type=absolute_path,
        help="folder of the files, searched recursively",
    )
    parser.add_argument(
        "--lists", metavar="CSV", type=absolute_path, nargs="+", required=True, help=lists
    )
    parser.add_argument(
        "--already-cut",
        action="store_true",
        help="a file named by the id alone, ID.mp4, is the clip and not the whole video",
    )


def clip_names(youtube_id: str, start: float, end: float) -> tuple[str, ...]:
    """Returns what the common downloaders call a clip of a video, without suffix.

    Looked up whole, never taken apart: ids contain underscores, hyphens and digits themselves.

    Args:
      youtube_id: The video.
      start: Of the clip, in seconds.
      end: Of the clip, in seconds.
    """
    plain_start, plain_end = f"{start:.10g}", f"{end:.10g}"
    return (
        f"{youtube_id}_{six_digits(start)}_{six_digits(end)}",  # ActivityNet's crawler, CVDF
        f"{youtube_id}_{round(start * 1000)}_{round(end * 1000)}",  # audiosetdl: milliseconds
        f"{youtube_id}_{plain_start}_{plain_end}",
        f"{youtube_id}_{start:.1f}_{end:.1f}",
        f"{youtube_id}_{start:.1f}-{end:.1f}",  # audioset-download
        f"{youtube_id}_{start:.3f}_{end:.3f}",  # as AudioSet's lists write the times
        f"{youtube_id}_{six_digits(start)}",  # VGG-Sound's test.csv
        f"{youtube_id}_{plain_start}",
        f"{youtube_id}_{start:.3f}",  # audioset-processing
    )


def six_digits(seconds: float) -> str:
    """Returns a time as file names have it: 000417, or 000417.500 where there is a fraction."""
    return f"{int(seconds):06d}" if seconds == int(seconds) else f"{seconds:010.3f}"
