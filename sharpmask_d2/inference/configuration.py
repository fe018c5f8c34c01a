"""The config of a run over images: a packaged model or a file, with the changes of a command line."""

from collections.abc import Sequence
from typing import Optional

from detectron2.config import CfgNode

from .. import model_zoo
from ..config import merge_options, read_config


def build_config(
    model: str = model_zoo.DEFAULT,
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    num_proposals: Optional[int] = None,
    opts: Sequence[str] = (),
) -> CfgNode:
    """Builds the config of a packaged model or of a file, and applies changes to it.

    Args:
        model: name of a packaged model; read only without `config_file`.
        config_file: path of a yaml file.
        weights: checkpoint, replaces MODEL.WEIGHTS; None keeps it.
        num_proposals: maximum number of proposals per image, replaces MODEL.SHARPMASK.TEST.NUM_PROPOSALS; None keeps it.
        opts: KEY, VALUE, KEY, VALUE, ...; applied last.

    Returns:
        A frozen config whose MODEL.DEVICE is `model_zoo.default_device()` unless `opts` set it.

    Raises:
        UserError: there is no such model, file or key, or a value has the wrong type; the message names it.
    """
    if config_file:
        cfg = read_config(config_file)
        cfg.MODEL.DEVICE = model_zoo.default_device()
    else:
        cfg = model_zoo.get_config(model)
    if weights is not None:
        cfg.MODEL.WEIGHTS = weights
    if num_proposals is not None:
        cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = num_proposals
    merge_options(cfg, tuple(opts))
    cfg.freeze()
    return cfg
