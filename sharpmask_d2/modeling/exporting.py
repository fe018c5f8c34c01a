"""Refuses to be exported, until export is built."""

import torch
from torch import nn


class NotExportable(nn.Module):
    """A network whose windows and masks are chosen in Python: a traced copy of it fits the traced image alone, which nothing says later."""

    def __prepare_scriptable__(self):
        """What torch.jit.script calls before it compiles a module or one that holds it."""
        self._refuse()

    def check_not_traced(self) -> None:
        """To be called first in `forward`.

        Raises:
            NotImplementedError: torch.jit.trace runs it, or an export that is built on it. fvcore may trace it to count operations.
        """
        counted = any(type(hook).__module__.startswith("fvcore.") for hook in self._forward_pre_hooks.values())
        if torch.jit.is_tracing() and not counted:
            self._refuse()

    def _refuse(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be exported: traced or scripted, it would fit the traced image alone. Run it in Python, as "
            "sharpmask_d2.inference.predictor does; of a detector, a part that does not hold it, such as the backbone, can be traced"
        )
