"""Git, asked by its command."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def git(
    *arguments: str, root: Path | None = None, stdin: str | None = None, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `git <arguments>` in `root`, the current folder by default, in English and without asking for a password.

    Returns:
        The finished process with its output as text; status 127 where Git is not installed.
    """
    command = ["git", *arguments]
    settings = os.environ | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"} | (environ or {})
    try:
        return subprocess.run(command, cwd=root, input=stdin, capture_output=True, text=True, env=settings, check=False)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", "git is not installed")


def revision(root: Path) -> str | None:
    """Return the commit that is checked out in `root`; None outside a repository or before the first commit."""
    return git("rev-parse", "HEAD", root=root).stdout.strip() or None
