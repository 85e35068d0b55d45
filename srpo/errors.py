"""What users are told in one line: what they can mend in their input, and what stands in the way."""

from __future__ import annotations

import errno
import os
import re

CURES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some") | {
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "give this user the right",
    errno.EXDEV: "rounds/ and .srpo/ must be on one file system; join them",
}
# libraries that write files of their own tell the number in words only
TOLD = re.compile(r"os error (\d+)|errno (\d+)", re.IGNORECASE)


class UserError(Exception):
    """Bad input. Its text is one line: the key or file, what is wrong with it, what to do.

    The CLI prints it without a traceback and exits with status 2; drivers never retry it.
    """


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
