"""Upload of an exported folder to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, errors

from srpo.errors import UserError, one_line
from srpo.lineage.identity import HUB_ID


def check_repository(repository: str) -> None:
    """Check the form of a repository's name.

    Raises:
        UserError: it is not `owner/name`.
    """
    if not HUB_ID.fullmatch(repository) or "/" not in repository:
        raise UserError(f"--push-to-hub: {repository!r} is not a repository; name it as owner/name")


def push_to_hub(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder as one commit to a model repository, which is created if it does not exist.

    The token is the one of `hf auth login` or HF_TOKEN.

    Args:
        private: of a new repository: only its owner sees it.

    Returns:
        The repository's address.

    Raises:
        UserError: the Hub refuses it or can't be reached. The folder stays.
    """
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # the Hub's client passes on errors of several transports
        raise UserError(
            f"--push-to-hub {repository}: {_reason(error)}. The export itself is complete:"
            f" `hf upload {repository} {folder}` uploads it"
        ) from None
    return str(url)


def _reason(error: Exception) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        known = {401: "no valid token; run `hf auth login`, or set HF_TOKEN", 403: "the token may not write there"}
        return known.get(status, f"the Hub answered with status {status}")
    return f"{type(error).__name__}: {re.sub(r'[a-z]+://[^ ]+', '', one_line(error)):.200}"
