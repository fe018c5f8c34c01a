"""Names of the trunk features that a config needs."""

from detectron2.config import CfgNode


def trunk_features(cfg: CfgNode) -> list[str]:
    """List the features of the trunk that the head and the refinement path use.

    Args:
        cfg: config; `MODEL.SHARPMASK.IN_FEATURE` and `MODEL.SHARPMASK.REFINEMENT` are read.

    Returns:
        The names without duplicates, first that of the head.
    """
    sharpmask = cfg.MODEL.SHARPMASK
    skips = [] if sharpmask.REFINEMENT.NAME == "none" else sharpmask.REFINEMENT.SKIP_FEATURES
    return list(dict.fromkeys([sharpmask.IN_FEATURE, *skips]))
