"""Errors of a fingerprint index that a user can fix."""

from __future__ import annotations

from avcl_jax.errors import UserError


class FingerprintError(UserError):
    """An index or a query cannot be used; the message names the thing, its value and the fix."""
