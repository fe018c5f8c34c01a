"""Resolves paths `sharpmask_d2://NAME` to the checkpoints that are installed with the package."""

from pathlib import Path

from detectron2.utils.file_io import PathHandler, PathManager

_FOLDER = Path(__file__).resolve().parent.parent / "model_zoo"


class PackagedFileHandler(PathHandler):
    """Detectron2's handler for such paths: `sharpmask_d2://lite0.pth` is the file lite0.pth in the package's model_zoo."""

    PREFIX = "sharpmask_d2://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs) -> str:
        name = path[len(self.PREFIX) :]
        names = sorted(file.name for file in _FOLDER.glob("*.pth"))
        if name not in names:
            raise FileNotFoundError(f"{path}: the package has no file {name!r}, only {', '.join(names)}")
        return str(_FOLDER / name)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return PathManager.open(self._get_local_path(path), mode, buffering=buffering, **kwargs)


PathManager.register_handler(PackagedFileHandler())
