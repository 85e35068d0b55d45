"""User-facing errors: one-line messages, with secrets redacted."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_LENGTH = 400
# line breaks, terminal controls and marks that change the direction of writing
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# up to the last @, because a password may contain one
USER_PART = re.compile(r"//\S*@")
SECRET_PART = re.compile(r"([?&][^=&\s]*(?:token|key|pass|secret|auth|cred|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
HINTS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free disk space") | {
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user the permission",
    errno.EXDEV: "move rounds/ and .srpo/ to one file system",
}
# Arrow and Polars give the error number in their message only
ERROR_NUMBER = re.compile(r"os error (\d+)|errno (\d+)", re.IGNORECASE)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def without_secrets(text: str) -> str:
    """Return the text without user names, passwords and parameters such as `token=` of the URLs in it."""
    return SECRET_PART.sub(r"\1...", USER_PART.sub("//", text))


class UserError(Exception):
    """Bad input. The message is one line: the key or file, the problem, the remedy.

    The command line prints it without a traceback and exits with status 2; flows do not retry it. Messages quote text
    of users and third parties, so unprintable characters are escaped, and the middle of a long message is cut.
    """

    def __init__(self, text: str) -> None:
        line = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
        half = MAX_LENGTH // 2
        super().__init__(line if len(line) <= MAX_LENGTH else f"{line[:half]} ... {line[-half:]}")


class MissingFile(UserError, FileNotFoundError):
    """A file of a round is missing: its stage has not run, or the file is not checked out."""


@contextmanager
def user_error(prefix: str, hint: str = "", reason: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Turn any exception raised in the `with` block into the UserError `<prefix>: <reason>; <hint>`.

    For calls into libraries, which raise whatever a bad file leads them to. `UserError` and `BlockedError` pass
    unchanged, and so does running out of a device's memory, which the caller may survive with a smaller batch.

    Args:
        prefix: the key or file, and what is wrong with it.
        hint: what to do; may be empty.
        reason: makes the text of the cause; the exception's own text, cut to 200 characters, if not given.

    Raises:
        UserError: the block raised.
    """
    try:
        yield
    except (UserError, BlockedError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import torch
            raise
        cause = (reason(error) if reason else f"{one_line(error):.200}") or type(error).__name__
        raise UserError(f"{prefix}: {cause}{f'; {hint}' if hint else ''}") from error


class BlockedError(Exception):
    """A problem outside the input, such as a full disk or another process. The message is one line.

    The command line prints it without a traceback and exits with status 1. The same command continues once the
    problem is solved.
    """


def environment_error_message(error: BaseException) -> str | None:
    """Return the line for a `BlockedError` or an error of the disk among the causes of `error`; None for others."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BlockedError):
            return str(cause)
        number = cause.errno if isinstance(cause, OSError) and cause.errno in HINTS else _parse_number(cause)
        if number in HINTS:
            file = getattr(cause, "filename", None)
            prefix = f"{file}: " if file else ""
            return f"{prefix}{os.strerror(number).lower()}; {HINTS[number]} and run the same command again"
        cause = cause.__cause__ or cause.__context__
    return None


def _parse_number(error: BaseException) -> int | None:
    match = ERROR_NUMBER.search(str(error))
    return int(match[1] or match[2]) if match else None
