"""Base class of networks that cannot be traced or scripted."""

import torch
from torch import nn


class NotExportable(nn.Module):
    """A network that raises an error when it is traced or scripted.

    Python code selects its windows and masks, so a traced copy would be valid for the traced image only, without any warning.
    """

    def __prepare_scriptable__(self) -> None:
        """Refuse scripting. `torch.jit.script` calls this method before it compiles the module or a module that contains it.

        Raises:
            NotImplementedError: always.
        """
        self._refuse()

    def check_not_traced(self) -> None:
        """Refuse tracing; subclasses call this method first in `forward`. Tracing by fvcore, which counts operations, is allowed.

        Raises:
            NotImplementedError: `torch.jit.trace`, or an export based on it, runs the network.
        """
        counted = any(type(hook).__module__.startswith("fvcore.") for hook in self._forward_pre_hooks.values())
        if torch.jit.is_tracing() and not counted:
            self._refuse()

    def _refuse(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be traced or scripted: the result would be valid for the traced image only. "
            "`sharpmask export-model` exports a SharpMask on a feature pyramid. Other models run in Python, as in "
            "sharpmask_d2.inference.predictor; parts of a detector that do not contain them, such as the backbone, can be traced"
        )
