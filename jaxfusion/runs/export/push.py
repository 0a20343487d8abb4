"""Uploads an export to the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from jaxfusion.data.pocket.lexicon import ABOUT_FILE
from jaxfusion.errors import InputError, cut, listed
from jaxfusion.hf.hub import HUB_ID, hub_in_reach

TOKENS = "https://huggingface.co/settings/tokens"
# What an earlier export may have written and a new one may not: other shards, a tower, a template,
# which transformers would read beside the new files or in their place. Of a pattern of the hub, `*`
# matches `/` too: names are whole, so that files of the same ending elsewhere stay.
REPLACED = ("model.safetensors", "model.safetensors.index.json",
            "model-?????-of-?????.safetensors", "encoder/*", "decoder/*", "encoder_tokenizer/*",
            "decoder_tokenizer/*", "modeling_jaxfusion.py", "tokenization_jaxfusion.py",
            "chat_template.jinja", "additional_chat_templates/*", "generation_config.json",
            "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
            "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece.model",
            "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", ABOUT_FILE)


def check_push(name: str, private: bool) -> None:
    """Asks the hub what can be asked before there is an export.

    Args:
      name: of the repository, ORG/NAME. private: whether a new one is to be private.

    Raises:
      InputError: the name has another form, the hub cannot be reached, nobody is logged in, the
        token may not write there, or the repository exists and is public although it should not be.
    """
    _check_name(name)
    if not hub_in_reach():
        raise InputError(f"--push needs {constants.ENDPOINT}, which cannot be reached (or "
                         "HF_HUB_OFFLINE is set); leave --push out, and upload the export later "
                         f"with: {by_hand(name, Path('HFDIR'), private)}")
    try:
        _check_token(HfApi().whoami(), name.split("/")[0])
        public = not HfApi().model_info(name).private
    except RepositoryNotFoundError:
        return  # it will be made
    except LocalTokenNotFoundError:
        raise InputError(f"--push needs to know who you are: hf auth login, with a token from "
                         f"{TOKENS} that may write") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--push {name}: {reason(error)}") from None
    if public and private:
        raise InputError(f"{name} exists and is public, and --private does not change that; make "
                         "it private in its settings, or give another name")


def _check_name(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise InputError(f"--push is '{name:.80}', expected ORG/NAME, as in my-name/my-bridge")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--push: {_lines(error)[0]}") from None


def _check_token(who: dict, namespace: str) -> None:
    """Raises InputError if a token cannot write to what belongs to `namespace`."""
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise InputError(f"the token '{token.get('displayName', '')}' may read, but not write; log "
                         f"in with another one from {TOKENS}: hf auth login")
    names = [who["name"], *(org["name"] for org in who.get("orgs", [])
                            if org.get("roleInOrg") != "read")]
    if namespace.lower() not in [name.lower() for name in names]:
        raise InputError(f"the token may not write to '{namespace}'; it may to {listed(names)}")


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads an export to a repository, which is made if there is none. What an earlier export
    wrote is replaced, with all that its directories hold; other files there stay.

    Returns:
      The address of its page.

    Raises:
      InputError: the upload failed; the export stays, and the message says how to upload it.
    """
    try:
        # None: public, unless the organisation's own default is private.
        HfApi().create_repo(name, private=private or None, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, delete_patterns=[*REPLACED],
                              commit_message="Export of jaxfusion")
    except Exception as error:  # whatever the libraries between here and there raise
        raise InputError(f"{folder} is written, but not all of it is on the hub: {reason(error)}; "
                         f"upload it with: {by_hand(name, folder, private)}") from None
    return f"{constants.ENDPOINT}/{name}"


def by_hand(name: str, folder: Path, private: bool) -> str:
    """The command that uploads an export."""
    words = ["hf", "upload", name, str(folder), "."]
    words += [x for pattern in REPLACED for x in ("--delete", pattern)]
    return shlex.join(words + ["--private"] * private)


def reason(error: BaseException) -> str:
    """One line on why the hub refused, from the first error of a chain that it answered with."""
    links = [error]
    while (before := links[-1].__cause__ or links[-1].__context__) and before not in links:
        links.append(before)
    refused = next((x for x in links if isinstance(x, HfHubHTTPError)), None)
    if refused is None:
        return cut(f"{type(links[-1]).__name__}: {' '.join(_lines(links[-1]))}")
    status = refused.response.status_code
    said = " ".join(_lines(refused.server_message or refused))
    help = {401: "; log in again: hf auth login",
            403: f"; what a token may do is set at {TOKENS}"}.get(status, "")
    return f"the hub answered {status}: {cut(said)}{help}"


def _lines(error: object) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
