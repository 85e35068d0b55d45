"""Git's conflict markers in text files."""

from __future__ import annotations

from srpo.errors import UserError

MARKERS = ("<<<<<<< ", ">>>>>>> ")


def check_no_conflict(name: str, text: str, hint: str) -> None:
    """Check that Git has left no conflict marker in a file.

    Args:
        name: the file, for the message.
        text: its content.
        hint: what to do.

    Raises:
        UserError: it has one; the line names the file, the line and the hint.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith(MARKERS):
            raise UserError(f"{name}:{number}: unresolved conflict of a Git merge; {hint}")
