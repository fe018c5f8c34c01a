"""Files of a bulk run on any file system that Arrow knows: local folders, s3://, gs:// and others."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..errors import UserError
from ..extras import RAY, import_extra

pa = import_extra("pyarrow", requirement=RAY)
fs = import_extra("pyarrow.fs", requirement=RAY)
pq = import_extra("pyarrow.parquet", requirement=RAY)


class Folder(NamedTuple):
    """A folder on one of Arrow's file systems."""

    filesystem: Any
    path: str

    def file(self, *parts: str) -> str:
        """Path of a file in the folder."""
        return "/".join([self.path, *parts])

    def files(self, suffix: str, *, below: str = "", recursive: bool = False) -> list[str]:
        """Sorted paths of the files with a suffix in the folder, or in the folder `below` in it."""
        selector = fs.FileSelector(self.file(below) if below else self.path, allow_not_found=True, recursive=recursive)
        found = self.filesystem.get_file_info(selector)
        return sorted(info.path for info in found if info.is_file and info.path.lower().endswith(suffix))

    def read_json(self, name: str) -> Optional[Any]:
        """The content of a JSON file; None if there is no such file."""
        if not self.filesystem.get_file_info(self.file(name)).is_file:
            return None
        with self.filesystem.open_input_stream(self.file(name)) as file:
            return json.loads(file.read())

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, which appears when it is complete."""
        self._write(name, lambda file: file.write(json.dumps(content).encode()))

    def write_table(self, name: str, table: Any) -> None:
        """Writes a Parquet file, which appears when it is complete."""
        self._write(name, lambda file: pq.write_table(table, file))

    def _write(self, name: str, write: Any) -> None:
        temporary = self.file(f".{name}.tmp")
        with self.filesystem.open_output_stream(temporary) as file:
            write(file)
        self.filesystem.move(temporary, self.file(name))


def open_folder(path: str, *, create: bool = False) -> Folder:
    """A folder, by its local path or its URI.

    Args:
        path: such as "results" or "s3://bucket/results".
        create: whether the folder is created if it does not exist. Default: False.

    Raises:
        UserError: the folder cannot be reached or created; the message names it.
    """
    filesystem, inside = resolve(path)
    if create:
        try:
            filesystem.create_dir(inside, recursive=True)
        except OSError as error:
            raise UserError(f"cannot create the folder {path}: {error}") from error
    return Folder(filesystem, inside.rstrip("/"))


def resolve(path: str) -> tuple[Any, str]:
    """Arrow's file system of a local path or URI, and the path on it.

    Raises:
        UserError: Arrow knows no such file system; the message names the path.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), str(Path(path).absolute())
    try:
        return fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no file system is known for it: {error}") from error
