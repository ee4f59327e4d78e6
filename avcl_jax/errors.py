"""Errors that a user can cause and fix, which every command prints as one line.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
import traceback

# System errors that only a wrong call can cause, never the state of the machine.
_WRONG_CALLS = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK, errno.ENOTTY})
# Clients of object stores and what they send requests by: some errors are not OSErrors, others
# are OSErrors without a number.
_STORES = ("aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})


class UserError(ValueError):
    """A setting, file or command that cannot be used: names it, its value, the problem, the fix."""


def printable(text: str) -> str:
    """Returns text in one line, with escapes for what no terminal shows.

    Names of files may contain line feeds, control characters, and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_out_of_memory(error: Exception) -> bool:
    """Tests whether memory of the host or of a device has run out; JAX has no class for it."""
    texts = ("RESOURCE_EXHAUSTED", "Out of memory")
    of_jax = type(error).__name__ == "JaxRuntimeError"
    return isinstance(error, MemoryError) or (of_jax and any(t in str(error) for t in texts))


def is_of_store(error: Exception) -> bool:
    """Tests whether an object store, or the way to it, failed: after it was tried several times."""
    if isinstance(error, FileNotFoundError | PermissionError):  # say what they are about
        return False
    if type(error).__module__.partition(".")[0] in _STORES:
        return True
    # Refusals and timeouts are plain OSErrors: where they were raised is all that tells.
    frames = list(traceback.walk_tb(error.__traceback__))
    module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, OSError) and error.errno is None and module.split(".")[0] in _STORES


def ends_a_command(error: Exception) -> bool:
    """Tests whether a user can cause and fix an error, so that a command prints its one line."""
    return isinstance(error, UserError | OSError) or is_of_store(error) or is_out_of_memory(error)


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line.

    Raises:
        OSError: `error` itself, if neither a file nor the state of the machine explains it.
    """
    if is_of_store(error):
        problem = " ".join(str(error).split()) or type(error).__name__
        return printable(f"the object store failed: {problem}; run again")
    if isinstance(error, OSError):
        return printable(_of_system(error))
    if is_out_of_memory(error):
        first, *_ = str(error).splitlines() or ["no more for this process"]
        return printable(
            f"out of memory ({first}): choose a smaller batch, in training also more micro_batches "
            "or a smaller bank"
        )
    return printable(" ".join(str(error).split()))


def _of_system(error: OSError) -> str:
    problem = error.strerror or " ".join(str(error).split())
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if files:
        fix = "; free some space" if error.errno in FULL_DISK else ""
        return f"{' -> '.join(files)}: {problem}{fix}"
    # Object stores raise these with the file in their text.
    if isinstance(error, FileNotFoundError | PermissionError) and error.errno is None:
        return problem
    if error.errno is None or error.errno in _WRONG_CALLS:
        raise error
    return f"{problem} ({errno.errorcode.get(error.errno, error.errno)})"
