"""What a run writes: checked before the work begins, written by one run at a time, and there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Optional, Union

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where runs do not exclude each other
    fcntl = None

__all__ = ["OutputError", "check_outputs", "open_locked", "open_output", "write_output"]

# Behind the name of a file while it is written, and behind that of one whose run can go on (proposal_files.py).
_TEMPORARY, PARTIAL = ".tmp", ".partial"


class OutputError(UserError):
    """A path that cannot or must not be written; the message names it and says what to do."""


def check_outputs(files: dict, *, inputs: Iterable, folders: Optional[dict] = None, images: Iterable = ()) -> None:
    """Find out before a run whether its outputs can be written, and that none of them replaces an input. Missing folders are made.

    Args:
        files: option of the command line -> path of a file to write; None for an output that was not asked for.
        inputs: paths of the files that the run reads; None is passed over.
        folders: option -> folder for pictures; None for pictures that were not asked for.
        images: images that the run reads, and folders in which it looks for them. No picture goes into a folder that has one of these
            images, where it could replace another, nor into a folder that is searched, where the next run would take it for an input.

    Raises:
        OutputError: an output is an input or another output, is no regular file, or cannot be written.
    """
    images = [Path(path) for path in images]
    searched = [path for path in images if path.is_dir()]
    holding = {path.parent: path for path in images if not path.is_dir()}
    read = {_identity(path) for path in (*inputs, *images) if path is not None}
    files = {option: path for option, path in files.items() if path is not None}
    folders = {option: path for option, path in (folders or {}).items() if path is not None}
    owners: dict = {}
    for option, path in files.items():
        if os.path.isdir(path):
            raise OutputError(f"{option}: {path} is a folder: name a file in it")
        if os.path.lexists(path) and not os.path.isfile(path):
            raise OutputError(f"{option}: {path} is no regular file: choose another output")
        # The files into which the output is written first are its own, too.
        for name in (os.path.realpath(path) + suffix for suffix in ("", _TEMPORARY, PARTIAL)):
            if _identity(name) in read:
                raise OutputError(f"{option}: {path} is one of the inputs: choose another output")
            if name in owners:
                raise OutputError(f"{option}: {path} is also written by {owners[name]}: choose another output")
            owners[name] = option
    for option, folder in folders.items():
        within = [os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)]
        for path in searched:
            if os.path.realpath(path) in within:
                raise OutputError(f"{option}: {folder} is, or lies in, the input folder {path}: choose another folder")
        for parent, image in holding.items():
            if os.path.realpath(parent) == within[0]:
                raise OutputError(f"{option}: the input {image} is in {folder}: choose another folder")
    # Writing is tried last, so that a refused run leaves no folder behind.
    for option, path in files.items():
        _try_file(option, Path(os.path.realpath(path)))
    for option, folder in folders.items():
        _try_folder(option, Path(folder))


def _identity(path: Union[str, os.PathLike]):
    """What two paths of one file have in common, also where there are links."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _try_file(option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + _TEMPORARY)
        with open_locked(temporary):
            temporary.unlink()
    except OSError as error:
        raise OutputError(f"{option}: cannot write {path}: {error.strerror}") from error


def _try_folder(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{option}: cannot write into the folder {folder}: {error.strerror}") from error


def open_locked(path: Path) -> BinaryIO:
    """Open a file for reading and writing that no other run writes; it is made where it is missing.

    The lock belongs to the process: however the process ends, nothing is left of the lock.

    Raises:
        OutputError: another run has opened the file in this way.
    """
    while True:
        # Not truncated before it is locked: it may be the file of another run.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(f"{path} is being written by another run: let it end, or choose another output") from None
        except OSError:  # a file system without locks
            return file
        # The run that had the lock may have moved the file to its place, or removed it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def open_output(path: Union[str, os.PathLike]) -> Iterator[BinaryIO]:
    """A file to write into, which appears under its name when the block ends. If the block fails, what was there before stays.

    Args:
        path: its folder is made where it is missing; a link stays one.

    Raises:
        OutputError: the file cannot be written, such as on a full disk, or another run is writing it.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(target.name + _TEMPORARY)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open_locked(temporary)
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows does not move an open file
                file.close()
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            # What did not fit on a full disk would fail here a second time.
            with contextlib.suppress(OSError):
                file.close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_output(path: Union[str, os.PathLike], content: bytes) -> None:
    """Write a whole file: see `open_output`."""
    with open_output(path) as file:
        file.write(content)
