"""SharpMask and DeepMask segment proposals for Detectron2."""

from . import compat  # noqa: F401  (first: it makes Detectron2 0.6 importable beside current libraries)

__version__ = "0.1.0"
