"""Why a media file cannot be prepared."""

from __future__ import annotations

from avcl_jax.errors import UserError

# Every reason for which a file is not decoded, and what it means. The list is closed:
# docs/data/rejected.md explains each, and each has a test with a file.
REASONS = {
    "not_found": "no such file",
    "unreadable": "the file cannot be read (permission, or an error of the file system)",
    "not_media": "not a film or a sound recording, or its header is missing or damaged",
    "empty": "neither picture nor sound in the file",
    "unsupported_codec": "no decoder for the codec",
    "damaged": "a part of the picture or sound cannot be decoded",
    "truncated": "the file ends before its header says it should",
    "too_large": "a picture of more than 67 million pixels, or more memory than a worker may use",
    "bad_timestamps": "times of frames or samples are missing, run backwards or leap",
    "mixed_sizes": "the frame size or the pixel aspect ratio changes",
    "outside": "the requested interval lies outside the file",
}


class MediaError(UserError):
    """A file that cannot be prepared, with one of the closed list of reasons.

    Attributes:
      reason: Key of `REASONS`.
      message: What was found.
    """

    def __init__(self, reason: str, message: str):
        """Keeps both; see the class."""
        super().__init__(reason, message)  # both as args: errors cross process borders
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        """Returns `reason: message`."""
        return f"{self.reason}: {self.message}"
