"""Errors that a user can cause and fix, which every command prints as one line.

Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno

# System errors that only a wrong call can cause, never the state of the machine.
_WRONG_CALLS = frozenset({errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTSOCK, errno.ENOTTY})


class UserError(ValueError):
    """A setting, file or command that cannot be used: names it, its value, the problem, the fix."""


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line.

    Raises:
        OSError: `error` itself, if neither a file nor the state of the machine explains it.
    """
    if isinstance(error, OSError):
        return _of_system(error)
    return " ".join(str(error).split())


def _of_system(error: OSError) -> str:
    problem = error.strerror or " ".join(str(error).split())
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if files:
        return f"{' -> '.join(files)}: {problem}"
    # Object stores raise these with the file in their text.
    if isinstance(error, FileNotFoundError | PermissionError) and error.errno is None:
        return problem
    if error.errno is None or error.errno in _WRONG_CALLS:
        raise error
    return f"{problem} ({errno.errorcode.get(error.errno, error.errno)})"
