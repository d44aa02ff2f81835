"""Where a model is: in a folder, or on the Hugging Face hub, of which only what is read is downloaded.

The hub's client reads HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT from the environment.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from skippy.engine.config import BUILTIN_MODEL
from skippy.engine.errors import CheckpointError
from skippy.engine.progress import bar_class

SMALL_FILES = ("*.json", "*.jinja", "s3d/*")
"""Configuration, tokenizer, index of the weights, and the adapter that may be published beside a model."""
ADAPTER_FILES = ("*.json", "*.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")

logger = logging.getLogger("skippy.engine")


def local_folder(model: str) -> Path | None:
    """The folder that a model names, or None if the name can only be one of the hub.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(str(files("skippy.engine") / "builtin")) if model == BUILTIN_MODEL else Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: name the folder that holds it and its config.json.")
    if HUB_ID.fullmatch(model):
        return None
    raise CheckpointError(
        f"There is no model folder {str(path)!r}, and it is no name on the hub such as owner/model "
        f"({BUILTIN_MODEL!r} names the built-in model)."
    )


def find_model(model: str, revision: str | None = None) -> Path:
    """The folder of a model; if it is on the hub, with the small files in it and maybe no weights.

    Args:
        revision: branch, tag or commit on the hub; None for its main branch.

    Raises:
        CheckpointError: there is no such model, or it cannot be had.
    """
    folder = local_folder(model)
    if folder is None:
        return download(model, revision, SMALL_FILES)
    if revision is not None:
        raise CheckpointError(f"{folder} is a folder and has no revision {revision!r}, as models on the hub do.")
    return folder


def find_trained(adapter: str) -> Path:
    """The folder of an adapter, or of a published head; one on the hub is downloaded.

    Raises:
        CheckpointError: it can only be one on the hub, and cannot be had.
    """
    folder = Path(os.path.expanduser(adapter))
    if folder.exists() or "/" not in adapter or not HUB_ID.fullmatch(adapter):
        return folder
    small = download(adapter, None, ("*.json",))
    if any(small.glob("*.index.json")):  # shards are those of a whole model: for the loader to refuse
        return small
    return download(adapter, small.name, ADAPTER_FILES)


def download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the hub's cache with the files of a model that match, downloaded if they are not there.

    Its name is the commit, so that what is downloaded by that name as a revision belongs together.

    Raises:
        CheckpointError: they cannot be had; the message says why and what to do.
    """
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), tqdm_class=bar_class()))
    except Exception as error:  # the client lets errors of its HTTP library through, which is not always the same one
        raise CheckpointError(" ".join(_reason(model, revision, error).split())) from error


def _reason(model: str, revision: str | None, error: Exception) -> str:
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    match error:
        case GatedRepoError():
            reason = (
                f"{model} is gated: accept its licence at {hub}/{model}, then set HF_TOKEN to a token of the account "
                f"that did (from {hub}/settings/tokens)"
            )
        case RepositoryNotFoundError():
            reason = (
                f"There is no folder {model!r}, and no such model on {hub}, or it is private: check the name, or set "
                "HF_TOKEN to a token that may read it"
            )
        case RevisionNotFoundError():
            reason = f"{model} has no revision {revision!r}: name a branch, a tag or a commit of {hub}/{model}"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
            reason = (
                f"There is no folder {model!r}, and not all of the model {model} is in the cache {cache}, while "
                "HF_HUB_OFFLINE forbids downloads: unset it, or name a folder"
            )
        case LocalEntryNotFoundError():
            reason = (
                f"There is no folder {model!r}, not all of the model {model} is in the cache {cache}, and {hub} cannot "
                f"be reached: check the network, or name a folder ({_first_line(error.__cause__ or error)})"
            )
        case HfHubHTTPError():
            reason = f"{hub} does not give {model}: {_first_line(error)}"
            if error.response.status_code in (401, 403):
                reason += "; is HF_TOKEN valid, and may it read this model?"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            reason = f"The disk of the cache {cache} is full: make room, or set HF_HOME to a folder on another disk"
        case _:
            reason = f"{model} cannot be downloaded from {hub}: {type(error).__name__}: {_first_line(error)}"
    return f"{reason}."


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
