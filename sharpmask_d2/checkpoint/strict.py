"""Loading a checkpoint that has to be complete."""

from ..errors import UserError
from .safe import SafeCheckpointer, list_names


class StrictCheckpointer(SafeCheckpointer):
    """A checkpointer for models that are run and not trained on: what the file lacks is an error, not a warning.

    Parameters that only the file has are left out, since one file may serve DeepMask and SharpMask.
    """

    def load(self, path: str, checkpointables=None) -> dict:
        """
        Args:
            path: anything that MODEL.WEIGHTS may be.

        Raises:
            FileNotFoundError: no such file.
            UserError: not a checkpoint, one of another model, or one with numbers that are not finite; the message names the file and the
                parameters.
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
        # Not worth a warning here: see the class.
        incompatible.unexpected_keys.clear()
        return incompatible


class _WrongModelError(Exception):
    pass
