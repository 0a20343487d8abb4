"""Rows of a Hugging Face dataset at a pinned revision: downloaded, streamed or cached."""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from jaxfusion.data.rows.files import with_class_names
from jaxfusion.data.tasks.spec import Placed, Source
from jaxfusion.errors import InputError, first_line
from jaxfusion.hf.hub import COMMIT, hub_in_reach

SCRIPTS = "scripts are no longer supported"  # from datasets 4's message for loading scripts
logger = logging.getLogger(__name__)


def read_hub(
    source: Source, split: str, language: str, labels: Sequence[str]
) -> Iterator[Placed]:
    """Rows of a split, with class names where the dataset's class names are the task's labels.

    Args:
      source: of kind `hub`. split: ours. language: the source's name.
      labels: of the task.

    Raises:
      InputError: the dataset cannot be read, or the hub is unreachable and no copy is cached.
    """
    config = _config(source, split, language)
    theirs, selected = source.rows(split)
    try:
        data = _open(source, config, theirs)
        names = label_names(data.features, labels)
        if source.streaming:
            rows = islice(enumerate(data), selected.start, selected.stop)
        else:
            chosen = range(len(data))[selected]
            rows = zip(chosen, data.select(chosen), strict=True)
        for number, row in rows:
            yield with_class_names(row, names), f"{source.name} ({config}) {split} row {number}"
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
    """The dataset's configuration; datasets with one per split have none for development."""
    theirs = "train" if split == "dev" else split
    return source.config and source.config.format(language=language, split=theirs)


def commit_of(source: Source, split: str, language: str) -> str | None:
    """The commit of a hub dataset's revision, to pin it; None for other sources."""
    if source.kind != "hub":
        return None
    theirs = source.names.get(language, language)
    try:
        commit = _builder(source.name, _config(source, split, theirs), source.revision).hash
    except InputError:
        raise
    except Exception:  # reading the rows reports the error
        return None
    return commit if COMMIT.fullmatch(commit or "") else None


@lru_cache(8)
def _builder(name: str, config: str | None, revision: str | None):
    """The dataset's builder; the cached copy's if the hub is unreachable."""
    import datasets

    reach = hub_in_reach()
    if not reach:  # one warning below replaces the library's four
        datasets.utils.logging.set_verbosity_error()
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    if not reach:
        if revision and COMMIT.fullmatch(revision) and builder.hash != revision:
            raise InputError(f"the hub is unreachable, and the cached copy of {name} is commit "
                             f"{builder.hash}, not {revision}")
        logger.warning("the hub is unreachable: reading the cached copy of %s, commit %s", name,
                       builder.hash)
    return builder


def _reason(error: Exception) -> str:
    if SCRIPTS in str(error):
        return (f"{first_line(error)}; data.revision=refs/convert/parquet reads the hub's own "
                "conversion, where there is one")
    absent = isinstance(error, ConnectionError | FileNotFoundError) or "find cache" in str(error)
    if absent and not hub_in_reach():
        return "the hub is unreachable and no copy is cached"
    return first_line(error)


def label_names(features: Any, labels: Sequence[str]) -> dict[str, list[str]]:
    """Class names by column, for the columns whose classes are these labels.

    A dataset's order of classes may differ from the task's.

    Args:
      features: of datasets or tensorflow-datasets: column -> description, with `names` if its
        values are class numbers; or None.
    """
    expected = {label.casefold() for label in labels}
    classes = {}
    for column, feature in dict(features or {}).items():
        names = getattr(feature, "names", None)
        if names and {str(name).casefold() for name in names} == expected:
            classes[column] = list(names)
    return classes
