"""Resolves a checkpoint name to a directory: a local path, or a hub id at a pinned revision."""

import logging
import os
import re
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib import request
from urllib.error import HTTPError

from jaxfusion.background import in_background
from jaxfusion.errors import InputError

MODEL_FILES = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab*", "merges.txt",
    "chat_template.jinja", "README.md",
]
# The same weights in other formats, and training states: gigabytes that are never read. A `*` in a
# pattern also matches a `/`.
EXCLUDED_FILES = ["consolidated*", "*/*"]
# All files of a model directory except its weights.
NOT_WEIGHTS = [pattern for pattern in MODEL_FILES if "safetensors" not in pattern]
HUB_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")  # branches and tags resolve to one
# Seconds to wait for the hub's first answer: until a warning, and in total.
PATIENCE, MOST_PATIENCE = 4.0, 30.0
logger = logging.getLogger(__name__)


@lru_cache(1)
def hub_in_reach() -> bool:
    """Whether the hub answers, through the environment's proxy if any; checked once.

    If it does not, the Hugging Face libraries are set offline: they would retry for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answer = in_background(lambda: answers(constants.ENDPOINT))
    try:
        in_reach = answer.result(PATIENCE)
    except TimeoutError:  # a slow hub must not count as unreachable for the rest of the run
        logger.warning("%s has not answered for %.0f s: waiting at most %.0f s more "
                       "(HF_HUB_OFFLINE=1 skips this)", constants.ENDPOINT, PATIENCE,
                       MOST_PATIENCE - PATIENCE)
        in_reach = False
        with suppress(TimeoutError):
            in_reach = answer.result(MOST_PATIENCE - PATIENCE)
        if not in_reach:
            logger.warning("the hub did not answer and is treated as unreachable")
    if in_reach:
        return True
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if config := sys.modules.get("datasets.config"):
        config.HF_HUB_OFFLINE = True
    return False


def answers(url: str) -> bool:
    """Whether a server answers at all."""
    try:
        request.urlopen(request.Request(url, method="HEAD"), timeout=MOST_PATIENCE).close()
    except HTTPError:
        return True
    except (OSError, ValueError) as error:  # a server with an untrusted certificate did answer
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def resolve(
    name: str, revision: str | None = None, also: tuple[str, ...] = ()
) -> tuple[Path, str | None]:
    """The checkpoint's directory, and its hub commit (None for a local path).

    Args:
      name: a directory, or a hub id such as `google/mt5-large`.
      revision: branch, tag or commit of a hub id; None: the head of the main branch. Callers
        store the returned commit, so that a later start reads the same bytes.
      also: patterns of additional files.

    Raises:
      InputError: no such directory; or the hub repository is missing, gated, unreachable, or has
        only pickles.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local, None
    if name.lower().endswith(".gguf"):
        raise InputError(convert_hint(name, "is a GGUF file", local.stem, "GGUF files are not "
                                      "loaded directly"))
    if not HUB_ID.fullmatch(name) or name.startswith(("./", "../")):
        raise InputError(
            f"'{name}' is neither a directory nor a hub id of the form owner/name"
        )
    path = Path(download(name, revision, MODEL_FILES))
    if also:
        download(name, path.name, list(also), ignore=[])
    if not list(path.glob("*.safetensors")):
        raise InputError(convert_hint(name, "has no safetensors weights", name.split("/")[-1]))
    return path, path.name


def find_files(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """A local directory, or the downloaded files of a hub id that match the patterns.

    Raises:
      InputError: the name is neither.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if not HUB_ID.fullmatch(name):
        raise InputError(f"'{name}' is neither a directory nor a hub id of the form owner/name")
    return Path(download(name, revision, patterns))


def convert_hint(
    source: str, problem: str, out: str, why: str = "pickles are never loaded here"
) -> str:
    """The error message for a checkpoint in another format, with the command that converts it."""
    return (
        f"{source} {problem}; {why}. Convert it once (needs the extra "
        f"'convert'): python -m jaxfusion.hf.convert {source} checkpoints/{out}"
    )


def download(
    name: str, revision: str | None, patterns: list[str], ignore: Sequence[str] = EXCLUDED_FILES
) -> str:
    """`snapshot_download` with one-line errors."""
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{name}"
    hub_in_reach()  # if not, this sets the libraries offline, so that they fail at once
    try:
        return snapshot_download(name, revision=revision, allow_patterns=patterns,
                                 ignore_patterns=list(ignore))
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its licence at {page}, then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name} has no revision '{revision}'; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{name} is not on the hub, or is private: check {page}; for a private or gated "
            "model log in with `hf auth login`"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        raise InputError(
            f"{name} is not a directory, and the hub cannot be reached: download it elsewhere "
            f"from {page} and give its directory (gated models also need `hf auth login`)"
        ) from None
