"""SharpMask and DeepMask segment proposals for Detectron2: importing the package registers everything.

Without Detectron2, `sharpmask_d2.runtime` runs exported models.
"""

import importlib.util

if importlib.util.find_spec("detectron2") is not None:
    from . import (
        compat,  # noqa: F401  (first: it makes Detectron2 0.6 importable beside current libraries)
        modeling,  # noqa: F401
    )
    from .config import add_sharpmask_config

__version__ = "0.2.0"
__all__ = ["add_sharpmask_config"]
