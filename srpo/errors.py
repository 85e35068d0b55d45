"""What users are told in one line: what they can mend in their input, what stands in the way; without secrets."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LONGEST = 400
# what would break the line, steer the terminal or turn the direction of writing
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# a password may hold @, so all up to the last one goes
USER_PART = re.compile(r"//\S*@")
SECRET_PART = re.compile(r"([?&][^=&\s]*(?:token|key|pass|secret|auth|cred|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some") | {
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user the right",
    errno.EXDEV: "rounds/ and .srpo/ must be on one file system; join them",
}
# libraries that write files of their own tell the number in words only
TOLD = re.compile(r"os error (\d+)|errno (\d+)", re.IGNORECASE)


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks, which libraries are free with."""
    return " ".join(str(error).split())


def without_secrets(text: str) -> str:
    """The text with user, password and parameters such as `token=` left out of the addresses in it."""
    return SECRET_PART.sub(r"\1...", USER_PART.sub("//", text))


class UserError(Exception):
    """Bad input. Its text is one line: the key or file, what is wrong with it, what to do.

    The CLI prints it without a traceback and exits with status 2; drivers never retry it. Texts quote what users and
    strangers wrote, so what can't be printed is shown escaped, and the middle of a very long text is left out.
    """

    def __init__(self, text: str) -> None:
        line = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), str(text))
        half = LONGEST // 2
        super().__init__(line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}")


class MissingFile(UserError, FileNotFoundError):
    """A file of a round is not there: its stage has not run, or it is not checked out."""


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
    """Something outside the input stands in the way, such as a full disk or another process. Its text is one line.

    The CLI prints it without a traceback and exits with status 1; once it is gone the same command goes on.
    """


def hindrance(error: BaseException) -> str | None:
    """The line for an error that is `BlockedError` or comes of a disk that takes no more; None for any other."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, BlockedError):
            return str(at)
        number = at.errno if isinstance(at, OSError) and at.errno in CURES else _number_told(at)
        if number in CURES:
            where = getattr(at, "filename", None)
            what = os.strerror(number).lower()
            return f"{f'{where}: ' if where else ''}{what}; {CURES[number]} and run the same command again"
        at = at.__cause__ or at.__context__
    return None


def _number_told(error: BaseException) -> int | None:
    found = TOLD.search(str(error))
    return int(found[1] or found[2]) if found else None
