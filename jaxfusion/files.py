"""Files and directories that are whole or not there, each with one writer at a time."""

import errno
import fcntl
import glob
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Any

from jaxfusion.errors import InputError, first_line

logger = logging.getLogger(__name__)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITER = ".writer"  # the note in a workdir of who writes there


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file of others holds.

    Raises:
      InputError: the file is missing, not UTF-8, not JSON, or another value.
    """
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is not a JSON object but a {type(found).__name__}")
    return found


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file that appears, or takes its new content, all at once.

    Raises:
      InputError: the disk is full.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    data = content.encode("utf-8") if isinstance(content, str) else content
    with no_room(file):
        try:
            # A link that somebody put there is not followed.
            with partial.open("xb") as opened:
                opened.write(data)
            partial.rename(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sum_of(file: Path) -> Path:
    """The file beside another that holds the length and digest of what was written there."""
    return file.with_name(f".{file.name}.sum")


def write_checked(file: Path, content: str | bytes) -> None:
    """As `write_whole`, of a file that is read back: what was written is noted beside it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    old = []
    if file.is_file():  # until it takes its new content, it has the old one
        now, noted = length_and_digest(file.read_bytes()), _read_sums(file)
        old = [now] if noted is None or now in noted else noted[:1]
    note_sums(file, [length_and_digest(data), *old])
    write_whole(file, data)


def note_sums(file: Path, sums: list[list[Any]]) -> None:
    """Notes the contents that a file may have."""
    write_whole(sum_of(file), json.dumps(sums) + "\n")


def length_and_digest(data: bytes) -> list[Any]:
    """What is noted of a content."""
    return [len(data), blake2b(data, digest_size=16).hexdigest()]


def _read_sums(file: Path) -> list[list[Any]] | None:
    """The contents that a file may have; None where that was never noted."""
    try:
        return [[int(size), str(digest)]
                for size, digest in json.loads(sum_of(file).read_text("utf-8"))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return []


def is_as_written(file: Path, data: bytes, grows: bool = False) -> bool:
    """Whether a file's content is one that was noted; true where none was, as by others.

    Args:
      grows: more may follow what was noted.
    """
    sums = _read_sums(file)
    return sums is None or any(
        (size <= len(data) if grows else size == len(data))
        and length_and_digest(data[:size])[1] == digest for size, digest in sums)


def read_checked(file: Path, repair: str) -> bytes:
    """What `write_checked` wrote, or a file of others.

    Args:
      repair: what to do where it is damaged.

    Raises:
      InputError: it is not what was written.
    """
    data = file.read_bytes()
    if not is_as_written(file, data):
        raise InputError(f"{file} is damaged: it is not what was written; {repair} (if it was "
                         f"changed on purpose, remove {sum_of(file).name} beside it)")
    return data


def read_json(file: Path, repair: str) -> dict[str, Any]:
    """The JSON object that `write_checked` wrote, or one of others.

    Raises:
      InputError: it is damaged.
    """
    try:
        found = json.loads(read_checked(file, repair))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {repair}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged, expected a JSON object: {repair}")
    return found


@contextmanager
def no_room(place: Path) -> Iterator[None]:
    """Says in one line that the disk is full, whatever says so inside.

    Raises:
      InputError: it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not _is_full(error):
            raise
        raise InputError(f"{place} could not be written: {_room(place)}; free some, and start the "
                         "same command again") from error


def _is_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it came of, is that of a full disk; libraries wrap it."""
    while error is not None:
        texts = [os.strerror(number) for number in NO_ROOM]
        if getattr(error, "errno", None) in NO_ROOM or any(x in str(error) for x in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def _room(place: Path) -> str:
    place = next(x for x in (place, *place.absolute().parents) if x.exists())
    free = shutil.disk_usage(place).free
    return f"no space left, {free / 2**20:,.1f} MiB are free on the disk of {place}"


@contextmanager
def only_writer(note: Path, what: Path, wait: bool = False) -> Iterator[bool]:
    """Keeps other processes from writing to the same place while the block runs.

    The note names who writes; it is locked, and removed at the end. A process that is killed
    holds no lock. Locks of NFS reach other hosts; on a file system without locks there is a
    warning, and none is held.

    Args:
      note: the file. what: the place that it is for, to be named in messages.
      wait: until the other one is done, in place of the error.

    Yields:
      Whether the lock is held.

    Raises:
      InputError: another process writes there; it is named.
    """
    lock = _take(note, what, wait)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        note.unlink(missing_ok=True)  # while it is locked: who waits for it looks again
        os.close(lock)


def _take(file: Path, what: Path, wait: bool) -> int | None:
    """The locked note, open; None where files cannot be locked."""
    said = False
    while True:
        with no_room(file):
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if not wait:
                raise InputError(f"{what} is being written by {_holder(file)}; wait for its end, "
                                 "or stop it") from None
            if not said:
                logger.info("waiting for %s, which writes %s", _holder(file), what)
            said = True
            time.sleep(0.2)
            continue
        except OSError as error:
            os.close(lock)
            file.unlink(missing_ok=True)
            logger.warning("%s cannot be locked (%s): see to it that no other process writes there",
                           what, error.strerror)
            return None
        if _is_same(lock, file):
            break
        os.close(lock)  # its holder has taken it away meanwhile
    holder = {"host": socket.gethostname(), "pid": os.getpid(),
              "since": datetime.now().astimezone().isoformat(timespec="seconds")}
    os.ftruncate(lock, 0)
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


def _is_same(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    try:
        found = json.loads(file.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def note_of(file: Path) -> Path:
    """The note beside a file or directory that names who writes it."""
    return file.with_name(f".{file.name}{WRITER}")


@contextmanager
def new_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory that appears under its name only when the block ends well.

    Of two processes that write the same one each writes its own, and the last one to end replaces
    the other's or finds the name taken. What one that was killed has left goes.

    Args:
      overwrite: it takes the place of what is there once it is whole.

    Raises:
      InputError: the name is taken by something other than an empty directory, or runs would be
        removed; the disk is full.
    """
    _check_runs(out)
    out = out.absolute()
    if out.parent.is_dir():
        with only_writer(note_of(out), out, wait=True) as alone:
            if alone:
                _clear(out)
    _check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}-{token_hex(4)}")
    # Locked as long as it is written: what is not may be cleared.
    with only_writer(note_of(partial), partial):
        partial.mkdir()
        try:
            with no_room(out):
                yield partial
            # Nothing waits for another process inside of this, so that it may wait itself.
            with only_writer(note_of(out), out, wait=True):
                _check_free(out, overwrite)
                _swap(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _swap(partial: Path, out: Path) -> None:
    """Puts a directory in the place of another one, or of none."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.rename(out.with_name(f".{out.name}.old-{os.getpid()}-{token_hex(4)}"))
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def _check_free(out: Path, overwrite: bool) -> None:
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        raise InputError(f"{out} is not empty; give another directory or remove it")
    if taken and not out.is_dir():
        raise InputError(f"{out} is a file; give the name of a directory")


def _check_runs(out: Path) -> None:
    """Raises InputError where a directory holds a run, or is where a run keeps its checkpoints."""
    whole = out.resolve()
    of = {place.parent for place in (whole, *whole.parents) if place.name == "checkpoints"}
    of |= {place.parent for place in whole.rglob("checkpoints") if place.is_dir()}
    for workdir in sorted(of):
        if (workdir / "config.json").is_file():
            raise InputError(f"{out} has to do with the run {workdir}: its checkpoints would be "
                             "removed or mixed with others; give another directory")


def _clear(out: Path) -> None:
    """Removes what killed processes have left of `out`; nobody else puts it in its place now."""
    name = re.compile(rf"\.{re.escape(out.name)}\.(partial|old)-\d+(-[0-9a-f]{{8}})?")
    for left in [path for path in out.parent.iterdir() if name.fullmatch(path.name)]:
        if ".old-" in left.name and not out.exists():
            left.rename(out)  # killed between the two renames
            continue
        with suppress(InputError), only_writer(note_of(left), left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    for note in out.parent.glob(f".{glob.escape(f'.{out.name}.partial-')}*{WRITER}"):
        with suppress(InputError), only_writer(note, out):
            pass  # which removes the note of one that is gone
