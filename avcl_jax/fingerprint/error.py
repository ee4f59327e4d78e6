"""What goes wrong with a fingerprint index, as one line for whoever ran the command."""

from __future__ import annotations

from avcl_jax.errors import UserError


class FingerprintError(UserError):
    """An index or a query cannot be used; the message names the thing, its value and the fix."""
