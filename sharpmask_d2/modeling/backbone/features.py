"""Which features of the trunk a configuration needs."""


def trunk_features(cfg) -> list:
    """Names of the features that the head and the refinement path of `cfg` read, without repetition."""
    sharpmask = cfg.MODEL.SHARPMASK
    skips = [] if sharpmask.REFINEMENT.NAME == "none" else sharpmask.REFINEMENT.SKIP_FEATURES
    return list(dict.fromkeys([sharpmask.IN_FEATURE, *skips]))
