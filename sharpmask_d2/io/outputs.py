"""Writes output files: they are checked before the work begins, written by one run at a time, and appear only when they are complete."""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Optional, Union

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where two runs may write the same file
    fcntl = None

PathLike = Union[str, os.PathLike]

__all__ = ["OutputError", "check_outputs", "open_locked", "open_output", "write_output"]

# Suffix of a file while it is being written, and of the file from which a stopped run is resumed (proposal_files.py).
_TEMPORARY, PARTIAL = ".tmp", ".partial"


class OutputError(UserError):
    """A path cannot or must not be written; the message names the path and says what to do."""


def check_outputs(
    files: dict[str, Optional[PathLike]],
    *,
    inputs: Iterable[Optional[PathLike]],
    folders: Optional[dict[str, Optional[PathLike]]] = None,
    images: Iterable[PathLike] = (),
) -> None:
    """Check before a run that its outputs can be written and that none of them replaces an input. Missing folders are created.

    Args:
        files: option of the command line -> path of a file to write; None for an output that is not wanted.
        inputs: paths of the files that the run reads; None is ignored.
        folders: option -> folder for pictures; None for pictures that are not wanted. None by default.
        images: paths of the images that the run reads, and folders that it searches for images; none by default. A folder for pictures
            must not hold one of these images, which a picture could replace, nor lie in a folder that is searched, where the next run
            would read the pictures as inputs.

    Raises:
        OutputError: an output is an input or another output, is not a regular file, or cannot be written.
    """
    images = [Path(path) for path in images]
    searched = [path for path in images if path.is_dir()]
    holding = {path.parent: path for path in images if not path.is_dir()}
    read = {_identity(path) for path in (*inputs, *images) if path is not None}
    files = {option: path for option, path in files.items() if path is not None}
    folders = {option: path for option, path in (folders or {}).items() if path is not None}
    owners: dict[str, str] = {}
    for option, path in files.items():
        if os.path.isdir(path):
            raise OutputError(f"{option}: {path} is a folder: name a file in it")
        if os.path.lexists(path) and not os.path.isfile(path):
            raise OutputError(f"{option}: {path} is not a regular file: choose another output")
        # The temporary files of an output count as well.
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
    # Writing is tried last, so that a run that is refused creates no folder.
    for option, path in files.items():
        _try_file(option, Path(os.path.realpath(path)))
    for option, folder in folders.items():
        _try_folder(option, Path(folder))


def _identity(path: PathLike) -> Union[str, tuple[int, int]]:
    """A value that two paths of one file share, even if one is a link."""
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
    """Open a file for reading and writing, and lock it against other runs. A missing file is created.

    The lock ends with the process, however the process ends.

    Args:
        path: of the file; its folder exists.

    Returns:
        The open file, at its beginning and not truncated.

    Raises:
        OutputError: another run has locked the file.
    """
    while True:
        # The file is not truncated before it is locked, because another run may be writing it.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise OutputError(
                f"{path} is being written by another run: wait until it ends, or choose another output"
            ) from None
        except OSError:  # a file system without locks
            return file
        # The run that held the lock may have renamed or removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def open_output(path: PathLike) -> Iterator[BinaryIO]:
    """Context manager for a file to write, which appears under its name when the block ends.

    If the block raises, a file that existed before stays unchanged.

    Args:
        path: of the file. A missing folder is created; a link stays a link, and its target is written.

    Yields:
        The open binary file.

    Raises:
        OutputError: the file cannot be written, for example on a full disk, or another run is writing it.
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
            # On a full disk, closing fails a second time.
            with contextlib.suppress(OSError):
                file.close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_output(path: PathLike, content: bytes) -> None:
    """Write a file as a whole, see `open_output`.

    Args:
        path: of the file.
        content: of the file.

    Raises:
        OutputError: see `open_output`.
    """
    with open_output(path) as file:
        file.write(content)
