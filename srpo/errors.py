"""What users are told: the exceptions that mean that they can mend it, and addresses without their secrets."""

from __future__ import annotations

import re

LONGEST = 400
# what would break the line, steer the terminal or turn the direction of writing
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# a password may hold @, so all up to the last one goes
USER_PART = re.compile(r"//\S*@")
SECRET_PART = re.compile(r"([?&][^=&\s]*(?:token|key|pass|secret|auth|cred|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


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
