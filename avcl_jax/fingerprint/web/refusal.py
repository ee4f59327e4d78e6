"""What the server answers instead of a result."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not carried out.

    Attributes:
        status: HTTP status.
        message: one line that names the thing, its value and the fix.
    """

    def __init__(self, status: int, message: str):
        """Keeps both; see the class."""
        super().__init__(status, message)
        self.status = status
        self.message = message
