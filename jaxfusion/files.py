"""Atomic files and directories, with checksums and one writer at a time."""

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
WRITER = ".writer"  # the file in a workdir that names its writer


def cache_dir() -> Path:
    """Where what can be made again is kept: `$JAXFUSION_CACHE`, or `~/.cache/jaxfusion`."""
    return Path(os.environ.get("JAXFUSION_CACHE") or Path("~/.cache/jaxfusion").expanduser())


def shipped(name: str) -> Path:
    """A directory that comes along: `configs` or `pocket`. In a wheel it is inside the package, in
    the repository beside it."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file that this library did not write.

    Raises:
      InputError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object but a {type(content).__name__}")
    return content


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file atomically.

    Raises:
      InputError: the disk is full.
    """
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # left by a killed process
    data = content.encode("utf-8") if isinstance(content, str) else content
    with no_room(file):
        try:
            # "x" does not follow an existing link.
            with partial.open("xb") as opened:
                opened.write(data)
            partial.rename(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sum_of(file: Path) -> Path:
    """The file next to another that holds the length and digest of its content."""
    return file.with_name(f".{file.name}.sum")


def write_checked(file: Path, content: str | bytes) -> None:
    """As `write_whole`, and records a checksum for `read_checked` next to the file."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    old = []
    if file.is_file():  # the old content stays valid until the rename
        now, noted = length_and_digest(file.read_bytes()), _read_sums(file)
        old = [now] if noted is None or now in noted else noted[:1]
    note_sums(file, [length_and_digest(data), *old])
    write_whole(file, data)


def note_sums(file: Path, sums: list[list[Any]]) -> None:
    """Records the contents that a file may have."""
    write_whole(sum_of(file), json.dumps(sums) + "\n")


def length_and_digest(data: bytes) -> list[Any]:
    """The checksum of a content: its length and digest."""
    return [len(data), blake2b(data, digest_size=16).hexdigest()]


def _read_sums(file: Path) -> list[list[Any]] | None:
    """The recorded checksums of a file; None if there are none."""
    try:
        return [[int(size), str(digest)]
                for size, digest in json.loads(sum_of(file).read_text("utf-8"))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return []


def is_as_written(file: Path, data: bytes, grows: bool = False) -> bool:
    """Whether a file's content matches a recorded checksum; True if none is recorded.

    Args:
      grows: more content may follow what the checksum covers.
    """
    sums = _read_sums(file)
    return sums is None or any(
        (size <= len(data) if grows else size == len(data))
        and length_and_digest(data[:size])[1] == digest for size, digest in sums)


def read_checked(file: Path, repair: str) -> bytes:
    """The content of a file, checked against its checksum if it has one.

    Args:
      repair: what to do if the file is damaged.

    Raises:
      InputError: the file does not match its checksum.
    """
    data = file.read_bytes()
    if not is_as_written(file, data):
        raise InputError(f"{file} is damaged: it does not match its checksum; {repair} (if you "
                         f"changed it on purpose, remove {sum_of(file).name} next to it)")
    return data


def read_json(file: Path, repair: str) -> dict[str, Any]:
    """The JSON object in a file, checked as in `read_checked`.

    Raises:
      InputError: the file is damaged.
    """
    try:
        content = json.loads(read_checked(file, repair))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {repair}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged, expected a JSON object: {repair}")
    return content


@contextmanager
def no_room(place: Path) -> Iterator[None]:
    """Turns any error about a full disk inside the block into one line.

    Raises:
      InputError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not _is_full(error):
            raise
        raise InputError(f"{place} could not be written: {_room(place)}; free some space and run "
                         "the same command again") from error


def _is_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it wraps, reports a full disk."""
    while error is not None:
        texts = [os.strerror(number) for number in NO_ROOM]
        if getattr(error, "errno", None) in NO_ROOM or any(x in str(error) for x in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def _room(place: Path) -> str:
    place = next(x for x in (place, *place.absolute().parents) if x.exists())
    free = shutil.disk_usage(place).free
    return f"no space left, {free / 2**20:,.1f} MiB free on the disk of {place}"


@contextmanager
def only_writer(note: Path, what: Path, wait: bool = False) -> Iterator[bool]:
    """Keeps other processes from writing to the same place while the block runs.

    The note names the writer; it is locked, and removed at the end. A killed process releases its
    lock. NFS locks work across hosts; a file system without locks gives a warning and no lock.

    Args:
      note: the file. what: what it protects, for messages.
      wait: wait for the other process instead of raising.

    Yields:
      Whether the lock is held.

    Raises:
      InputError: another process is writing; the message names it.
    """
    lock = _take(note, what, wait)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        note.unlink(missing_ok=True)  # while it is locked: a waiting process checks again
        os.close(lock)


def _take(file: Path, what: Path, wait: bool) -> int | None:
    """The locked note, open; None if files cannot be locked."""
    reported = False
    while True:
        with no_room(file):
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if not wait:
                raise InputError(f"{what} is being written by {_holder(file)}; wait for it to "
                                 "finish, or stop it") from None
            if not reported:
                logger.info("waiting for %s, which is writing %s", _holder(file), what)
            reported = True
            time.sleep(0.2)
            continue
        except OSError as error:
            os.close(lock)
            file.unlink(missing_ok=True)
            logger.warning("%s cannot be locked (%s): make sure that no other process writes to it",
                           what, error.strerror)
            return None
        if _is_same(lock, file):
            break
        os.close(lock)  # its holder removed it meanwhile
    holder = {"host": socket.gethostname(), "pid": os.getpid(),
              "since": datetime.now().astimezone().isoformat(timespec="seconds")}
    os.ftruncate(lock, 0)
    with suppress(OSError):  # on a full disk the lock works without a name
        os.pwrite(lock, json.dumps(holder).encode(), 0)
    return lock


def _is_same(lock: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), os.stat(file))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    try:
        holder = json.loads(file.read_text("utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def note_of(file: Path) -> Path:
    """The note next to a file or directory that names its writer."""
    return file.with_name(f".{file.name}{WRITER}")


@contextmanager
def new_directory(out: Path, overwrite: bool | None = None) -> Iterator[Path]:
    """A directory that appears under its name only when the block succeeds.

    Two processes that write the same directory each write their own copy; the last one to finish
    replaces the other's, or fails because the name is taken. Leftovers of killed processes are
    removed.

    Args:
      overwrite: replace an existing directory once the new one is complete; None where no flag
        asks for that.

    Raises:
      InputError: the name is taken by anything but an empty directory, a run would be removed, or
        the disk is full.
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
    # Locked while it is written: unlocked leftovers may be removed.
    with only_writer(note_of(partial), partial):
        partial.mkdir()
        try:
            with no_room(out):
                yield partial
            _open_up(partial)
            # Nothing inside waits for another process, so waiting here cannot deadlock.
            with only_writer(note_of(out), out, wait=True):
                _check_free(out, overwrite)
                _swap(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _open_up(folder: Path) -> None:
    """Lets others read what they could read if it had been written directly: libraries write some
    files through temporary ones, which only their owner may read."""
    usual = folder.stat().st_mode & 0o777  # of a new directory, after the umask
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o777 | usual & (0o777 if path.is_dir() else 0o666))


def _swap(partial: Path, out: Path) -> None:
    """Moves a directory to its final name, replacing an existing one."""
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


def _check_free(out: Path, overwrite: bool | None) -> None:
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if taken and not overwrite:
        also = "" if overwrite is None else ", or replace what is there with --overwrite"
        raise InputError(f"{out} is not empty; give another directory or remove it{also}")
    if taken and not out.is_dir():
        raise InputError(f"{out} is a file; give the name of a directory")


def _check_runs(out: Path) -> None:
    """Raises InputError if a directory contains a run or is inside a run's checkpoints."""
    resolved = out.resolve()
    workdirs = {place.parent for place in (resolved, *resolved.parents)
                if place.name == "checkpoints"}
    workdirs |= {place.parent for place in resolved.rglob("checkpoints") if place.is_dir()}
    for workdir in sorted(workdirs):
        if (workdir / "config.json").is_file():
            raise InputError(f"{out} belongs to the run {workdir}: its checkpoints would be "
                             "removed or mixed with others; give another directory")


def _clear(out: Path) -> None:
    """Removes leftovers of `out` by killed processes; the caller holds the lock."""
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
            pass  # leaving the block removes the note of a dead process
