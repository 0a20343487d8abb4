"""Rows of a Hugging Face dataset, at a pinned revision, streamed or not, or of its copy here."""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from jaxfusion.data.rows.files import named
from jaxfusion.data.tasks.spec import Placed, Source
from jaxfusion.errors import InputError, first_line
from jaxfusion.hf.hub import COMMIT, hub_in_reach

SCRIPTS = "scripts are no longer supported"  # of datasets that were written before version 4
logger = logging.getLogger(__name__)


def read_hub(
    source: Source, split: str, language: str, labels: Sequence[str]
) -> Iterator[Placed]:
    """Rows of a split; classes that the dataset names as the task does have their names.

    Args:
      source: of kind `hub`. split: ours. language: as the source calls it.
      labels: of the task.

    Raises:
      InputError: it cannot be read, or is out of reach and no copy is here.
    """
    config = _config(source, split, language)
    theirs, wanted = source.rows(split)
    try:
        data = _open(source, config, theirs)
        names = label_names(data.features, labels)
        if source.streaming:
            rows = islice(enumerate(data), wanted.start, wanted.stop)
        else:
            chosen = range(len(data))[wanted]
            rows = zip(chosen, data.select(chosen), strict=True)
        for number, row in rows:
            yield named(row, names), f"{source.name} ({config}) {split} row {number}"
    except InputError:
        raise
    except Exception as error:  # whatever the hub and its libraries raise
        raise InputError(
            f"dataset {source.name} ({config}, {theirs}) cannot be read: {_reason(error)}. Without "
            f"the hub, put {split}-{language}.jsonl in a directory and set config.data.path to it"
        ) from None


def _open(source: Source, config: str | None, split: str):
    builder = _builder(source.name, config, source.revision)
    if source.streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _config(source: Source, split: str, language: str) -> str | None:
    """Its configuration; datasets with one per split have none for development."""
    theirs = "train" if split == "dev" else split
    return source.config and source.config.format(language=language, split=theirs)


def commit_of(source: Source, split: str, language: str) -> str | None:
    """The commit that a hub dataset's revision is now, to pin it by; None for what is no such."""
    if source.kind != "hub":
        return None
    theirs = source.names.get(language, language)
    try:
        found = _builder(source.name, _config(source, split, theirs), source.revision).hash
    except InputError:
        raise
    except Exception:  # reading it says what is wrong
        return None
    return found if COMMIT.fullmatch(found or "") else None


@lru_cache(8)
def _builder(name: str, config: str | None, revision: str | None):
    """The dataset's builder; of a hub out of reach, that of the copy here."""
    import datasets

    reach = hub_in_reach()
    if not reach:  # what they would say in four lines is said below in one
        datasets.utils.logging.set_verbosity_error()
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    if not reach:
        if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
            raise InputError(f"the hub is out of reach, and the copy of {name} here is commit "
                             f"{builder.hash}, not {revision}")
        logger.warning("the hub is out of reach: reading %s from its copy here, commit %s", name,
                       builder.hash)
    return builder


def _reason(error: Exception) -> str:
    if SCRIPTS in str(error):
        return (f"{first_line(error)}; data.revision=refs/convert/parquet reads the hub's own "
                "conversion, where there is one")
    absent = isinstance(error, ConnectionError | FileNotFoundError) or "find cache" in str(error)
    if absent and not hub_in_reach():
        return "the hub is out of reach and no copy is here"
    return first_line(error)


def label_names(features: Any, labels: Sequence[str]) -> dict[str, list[str]]:
    """Names of the classes, by column, of the columns whose classes are these labels.

    A dataset numbers its classes in its own order, which need not be the task's.

    Args:
      features: of datasets or tensorflow-datasets: column -> a description, which has `names` if
        its values are numbers of classes; or None.
    """
    wanted = {label.casefold() for label in labels}
    found = {}
    for column, feature in dict(features or {}).items():
        names = getattr(feature, "names", None)
        if names and {str(name).casefold() for name in names} == wanted:
            found[column] = list(names)
    return found
