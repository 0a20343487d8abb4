"""A checkpoint's name → a directory on disk: a local path, or a hub id at a pinned revision."""

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

WANTED = [
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab*", "merges.txt",
    "chat_template.jinja", "README.md",
]
# The same weights in other formats, and states of training: gigabytes that nobody reads. A `*` of a
# pattern matches a `/`, too.
UNWANTED = ["consolidated*", "*/*"]
# Everything of a model directory but its weights.
NOT_WEIGHTS = [pattern for pattern in WANTED if "safetensors" not in pattern]
HUB_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")  # what a branch or tag is resolved to
# Seconds for a first answer of the hub: until it is said that it is slow, and in all.
PATIENCE, MOST_PATIENCE = 4.0, 30.0
logger = logging.getLogger(__name__)


@lru_cache(1)
def hub_in_reach() -> bool:
    """Whether the hub answers, through the proxy that the environment names; asked once.

    Where it does not, the Hugging Face libraries are told so: they would try for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    found = in_background(lambda: answers(constants.ENDPOINT))
    try:
        in_reach = found.result(PATIENCE)
    except TimeoutError:  # a slow hub is no hub out of reach, for the whole run at that
        logger.warning("%s has not answered for %.0f s: waiting %.0f s at most (HF_HUB_OFFLINE=1 "
                       "spares it)", constants.ENDPOINT, PATIENCE, MOST_PATIENCE - PATIENCE)
        in_reach = False
        with suppress(TimeoutError):
            in_reach = found.result(MOST_PATIENCE - PATIENCE)
        if not in_reach:
            logger.warning("it is taken to be out of reach")
    if in_reach:
        return True
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if config := sys.modules.get("datasets.config"):
        config.HF_HUB_OFFLINE = True
    return False


def answers(url: str) -> bool:
    """Whether a server answers, with whatever it says."""
    try:
        request.urlopen(request.Request(url, method="HEAD"), timeout=MOST_PATIENCE).close()
    except HTTPError:
        return True
    except (OSError, ValueError) as error:  # its certificate is for others to judge
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def resolve(
    name: str, revision: str | None = None, also: tuple[str, ...] = ()
) -> tuple[Path, str | None]:
    """The checkpoint's directory, and the hub commit it is (None for a local path).

    Args:
      name: a directory, or a hub id such as `google/mt5-large`.
      revision: branch, tag or commit of a hub id; None is the newest of the main branch. Callers
        keep the returned commit, so that a later start reads the same bytes.
      also: patterns of further files.

    Raises:
      InputError: no such directory; or the hub repository is absent, gated, out of reach, or
        holds only pickles.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local, None
    if not HUB_ID.fullmatch(name) or name.startswith(("./", "../")):
        raise InputError(
            f"'{name}' is neither a directory here nor a hub id of the form owner/name"
        )
    path = Path(download(name, revision, WANTED))
    if also:
        download(name, path.name, list(also), ignore=[])
    if not list(path.glob("*.safetensors")):
        raise InputError(convert_hint(name, "holds no safetensors weights", name.split("/")[-1]))
    return path, path.name


def find_files(name: str, patterns: list[str], revision: str | None = None) -> Path:
    """A directory here, or the files of a hub id that match the patterns.

    Raises:
      InputError: neither of them.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if not HUB_ID.fullmatch(name):
        raise InputError(f"'{name}' is neither a directory here nor a hub id owner/name")
    return Path(download(name, revision, patterns))


def convert_hint(source: str, problem: str, out: str) -> str:
    """The refusal of a pickle checkpoint, with the command that mends it."""
    return (
        f"{source} {problem}; pickles are never loaded here. Convert it once (needs the extra "
        f"'convert'): python -m jaxfusion.hf.convert {source} checkpoints/{out}"
    )


def download(
    name: str, revision: str | None, patterns: list[str], ignore: Sequence[str] = UNWANTED
) -> str:
    """`snapshot_download` with each of its failures as one line."""
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{name}"
    hub_in_reach()  # if it is not, this says so at once
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
            f"{name} is no directory here and the hub cannot be reached: download it elsewhere "
            f"from {page} and give its directory (gated models also need `hf auth login`)"
        ) from None
