"""Loads checkpoints that must hold every parameter of the model."""

from typing import Any, Optional

from ..errors import UserError
from .safe import SafeCheckpointer, list_names


class StrictCheckpointer(SafeCheckpointer):
    """A checkpointer for inference: a parameter that the file lacks is an error, not a warning.

    Parameters that only the file has are ignored, because one file may serve DeepMask and SharpMask.
    """

    def load(self, path: str, checkpointables: Optional[list[str]] = None) -> dict[str, Any]:
        """Load the parameters of a file into the model.

        Args:
            path: any value of MODEL.WEIGHTS.
            checkpointables: names of further objects to load, as for Detectron2's checkpointer; all by default.

        Returns:
            What the file holds besides.

        Raises:
            FileNotFoundError: the file does not exist.
            UserError: the file is not a checkpoint, is from another model, or has numbers that are not finite; the message names the file
                and the parameters.
        """
        try:
            return super().load(path, checkpointables)
        except AssertionError as error:
            raise FileNotFoundError(f"MODEL.WEIGHTS: there is no checkpoint {path}") from error
        except _WrongModelError as error:
            raise UserError(
                f"{path} does not fit this model: {error}; is it the checkpoint of another config?"
            ) from None

    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        missing = [key for key in incompatible.missing_keys if not key.endswith("num_batches_tracked")]
        wrong = [key for key, *_ in incompatible.incorrect_shapes]
        if missing or wrong:
            names = sorted({*missing, *wrong})
            raise _WrongModelError(f"it lacks, or has in another shape, {list_names(names)}")
        # These deserve no warning, see the class.
        incompatible.unexpected_keys.clear()
        return incompatible


class _WrongModelError(Exception):
    """The checkpoint lacks parameters of the model; the message names them."""
