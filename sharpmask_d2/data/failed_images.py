"""The one rule for images that cannot be done: each is named with its cause and left out, and everything else is done."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from tqdm import tqdm

from .images import ImageError


class FailedImages:
    """Names the images that could not be done, and counts them.

    failed = FailedImages()
    for image in images:
        with failed.named(image.image_id, image.path):
            ...
    return failed.status()
    """

    def __init__(self):
        self._paths = set()

    @contextlib.contextmanager
    def named(self, image_id, path: Union[str, Path], *, consequence: str = "it is left out") -> Iterator[None]:
        """Whatever fails in the block is a failure of this image, except that memory runs out or the user stops the run.

        Args:
            image_id, path: of the image.
            consequence: what becomes of the image.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            self._paths.add(str(path))
            tqdm.write(f"cannot do image {image_id}, {path}: {describe(error)}; {consequence}", file=sys.stderr)
            logging.getLogger(__name__).debug("image %s", image_id, exc_info=error)

    def __len__(self) -> int:
        return len(self._paths)

    def status(self) -> int:
        """Say how many images could not be done. Returns the exit status: 1 if there are some, else 0."""
        if self._paths:
            print(f"{len(self)} image{'s'[: len(self) > 1]} could not be done, see above", file=sys.stderr)
        return int(bool(self._paths))


def describe(error: Exception) -> str:
    """The cause of a failure in one line, without the file that the message names anyway."""
    if isinstance(error, ImageError):
        return error.reason
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    line = next(iter(text.strip().splitlines()), "")
    # What is not about the file itself is told apart by its type.
    return line if isinstance(error, (OSError, ValueError)) and line else f"{type(error).__name__}: {line}"
