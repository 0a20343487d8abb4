"""Rows of a prepared tensorflow-datasets dataset, without TensorFlow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxfusion.data.rows.files import with_class_names
from jaxfusion.data.rows.hub import label_names
from jaxfusion.data.tasks.spec import Placed, Source
from jaxfusion.errors import InputError, first_line

ROWS = 1024  # read at a time


def read_tfds(
    source: Source, split: str, language: str, labels: Sequence[str]
) -> Iterator[Placed]:
    """Rows of a split of an ArrayRecord or Parquet dataset.

    Args:
      source: of kind `tfds`: a name, looked up below `$TFDS_DATA_DIR` (default
        `~/tensorflow_datasets`), or the directory of one version of a dataset.
      split: ours. language: the source's name. labels: of the task.

    Raises:
      InputError: the dataset is not prepared, exists only as TFRecord, or has a text that is not
        UTF-8.
    """
    theirs, selected = source.rows(split)
    builder = _builder(source, language)
    if theirs not in builder.info.splits:
        raise InputError(f"{source.place} has no split '{theirs}'; it has "
                         f"{', '.join(builder.info.splits)}")
    try:
        data = builder.as_data_source(theirs)
    except NotImplementedError:  # a format without random access
        raise InputError(_only_tfrecord(source, builder)) from None
    names = label_names(builder.info.features, labels)
    numbers = range(len(data))[selected]
    for first in range(0, len(numbers), ROWS):
        part = numbers[first : first + ROWS]
        for number, row in zip(part, data.__getitems__(part), strict=True):
            where = f"{source.place} {theirs} row {number}"
            yield with_class_names(as_builtin(row, where), names), where


def _builder(source: Source, language: str):
    import tensorflow_datasets as tfds

    if Path(source.name).expanduser().is_dir():
        place = Path(source.name).expanduser()
        if not (place / "dataset_info.json").is_file():
            raise InputError(f"{place} has no dataset_info.json; tfds: takes the directory of one "
                             "version, such as .../xnli/plain_text/1.1.0")
        return tfds.builder_from_directory(place)
    config = source.config and source.config.replace("{language}", language)
    name = f"{source.name}/{config}" if config else source.name
    try:
        builder = tfds.builder(name)
    except Exception as error:  # an unknown name, or a dataset whose description needs TensorFlow
        raise InputError(f"tfds:{name} cannot be opened: {first_line(error)}") from None
    if not builder.data_path.exists():
        raise InputError(f"tfds:{name} is not prepared in {builder.data_path}; prepare it with "
                         f"{_command(name, builder)}, or set TFDS_DATA_DIR to where it is")
    return builder


def _only_tfrecord(source: Source, builder) -> str:
    name = builder.info.full_name.rpartition("/")[0]
    return (f"{source.place} exists only as {builder.info.file_format.value}, which needs "
            f"TensorFlow; prepare it once as ArrayRecord: {_command(name, builder)}, with another "
            "data_dir")


def _command(name: str, builder) -> str:
    return (f"`python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', "
            "file_format='array_record').download_and_prepare()\"`")


def as_builtin(value: Any, where: str) -> Any:
    """A decoded feature as built-in Python types: bytes become text, arrays lists.

    Raises:
      InputError: bytes that are not UTF-8.
    """
    if isinstance(value, dict):
        return {key: as_builtin(x, where) for key, x in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: a text is not UTF-8 ({error.reason})") from None
    if hasattr(value, "tolist"):
        return as_builtin(value.tolist(), where)
    if isinstance(value, list | tuple):
        return [as_builtin(x, where) for x in value]
    return value
