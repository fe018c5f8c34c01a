"""Models that come with the package, and the config files that they and others are trained with.

As in `detectron2.model_zoo`, a model is asked for by name. A name is that of a packaged model, such as "sharpmask_bifpn_lite0", or the path
of a config file relative to configs/, such as "deepmask_R_50.yaml" or "lazy/sharpmask_R_50.py".
"""

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Optional

from ..errors import UserError

# The names of the models are known without torch and Detectron2.
if TYPE_CHECKING:
    import torch

_FOLDER = Path(__file__).resolve().parent
# In the wheel they lie beside the packaged models, in the repository at its top.
_CONFIGS = _FOLDER / "configs" if (_FOLDER / "configs").is_dir() else _FOLDER.parents[1] / "configs"

_WEIGHTS = {
    # One file holds both: the detector classifies the proposals on the backbone that makes them.
    "sharpmask_bifpn_lite0": "bifpn_lite0.pth",
    "multipath_bifpn_lite0": "bifpn_lite0.pth",
    # One file holds both: SharpMask is the same network with another mask branch.
    "deepmask_lite0": "lite0.pth",
    "sharpmask_lite0": "lite0.pth",
}

DEFAULT = "sharpmask_bifpn_lite0"
DEFAULT_DETECTOR = "multipath_bifpn_lite0"

# Models of version 0.1 that are no longer packaged, and those that take their place.
_REPLACED = {
    "sharpmask_fpn_lite0": DEFAULT,
    "multipath_fpn_lite0": DEFAULT_DETECTOR,
    "multipath_lite0": DEFAULT_DETECTOR,
}


def names() -> list[str]:
    """Lists the names of the packaged models."""
    return sorted(_WEIGHTS)


def get_config_file(name: str) -> str:
    """Returns the path of a config file.

    Args:
        name: of a packaged model, or the path of a config file relative to configs/.

    Raises:
        UserError: there is no such model or config file; the message lists the models or the files of that kind.
    """
    suffix = PurePosixPath(name).suffix
    if suffix not in (".yaml", ".py"):
        if name in _REPLACED:
            raise UserError(f"{name!r} was packaged in version 0.1 only: {_REPLACED[name]!r} takes its place")
        if name not in _WEIGHTS:
            raise UserError(f"there is no packaged model {name!r}: choose from {names()}")
        return str(_FOLDER / f"{name}.yaml")
    files = [path.relative_to(_CONFIGS).as_posix() for path in sorted(_CONFIGS.rglob(f"*{suffix}"))]
    if name not in files:
        raise UserError(f"there is no config file {name!r}: choose from {files}")
    return str(_CONFIGS / name)


def get_config(name: str = DEFAULT, trained: Optional[bool] = None) -> Any:
    """Returns the config of a model, as `detectron2.model_zoo.get_config` does.

    Args:
        name: see `get_config_file`.
        trained: True sets MODEL.WEIGHTS to the packaged weights; the config file of a packaged model has them, too, to be trained further.
            False keeps the weights of the config file, which training starts from; in the configs of packaged models there are none.
            None, the default, is True for the name of a packaged model and False for a config file.

    Returns:
        For a packaged model and a .yaml file a `CfgNode`, in which MODEL.DEVICE is "cuda" if torch finds a GPU, else "cpu". For a .py file
        the `DictConfig` of Detectron2's LazyConfig, in which `train.init_checkpoint` is the checkpoint.

    Raises:
        UserError: there is no such model or config file, or no packaged weights for it.
    """
    file = get_config_file(name)
    weights = packaged_weights(name) if trained or (trained is None and name in _WEIGHTS) else None
    if file.endswith(".py"):
        from detectron2.config import LazyConfig

        cfg = LazyConfig.load(file)
        if weights:
            cfg.train.init_checkpoint = weights
        return cfg
    from ..config import read_config

    cfg = read_config(file)
    if weights:
        cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.DEVICE = default_device()
    return cfg


def get(name: str = DEFAULT, trained: Optional[bool] = None, device: Optional[str] = None) -> "torch.nn.Module":
    """Builds a model and loads its weights, as `detectron2.model_zoo.get` does.

    Args:
        name: see `get_config_file`.
        trained: see `get_config`.
        device: device of the model, such as "cpu"; None takes "cuda" if torch finds a GPU, else "cpu".

    Returns:
        The model in training mode, as Detectron2 builds it. Its weights are random where neither the package nor the config has any.

    Raises:
        FileNotFoundError: the checkpoint that the config names does not exist.
        UserError: see `get_config`; or there is no such device, or the weights do not fit the model.
    """
    from detectron2.config import CfgNode, instantiate
    from detectron2.modeling import build_model

    from ..checkpoint import SafeCheckpointer, StrictCheckpointer
    from ..config import check_device

    cfg = get_config(name, trained)
    where = device or default_device()
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = where
        check_device(cfg)
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    else:
        model, weights = instantiate(cfg.model).to(where), cfg.train.init_checkpoint
    if weights:
        # Packaged weights are complete. Weights that training starts from may lack what is to be trained.
        complete = weights.startswith(str(_FOLDER))
        (StrictCheckpointer if complete else SafeCheckpointer)(model).load(weights)
    return model


def packaged_weights(name: str) -> str:
    """Returns the path of the weights that the package has for a model.

    Args:
        name: of a packaged model, or the path of the config file that it was trained with.

    Raises:
        UserError: there are none; the message lists the packaged models.
    """
    model = name if name in _WEIGHTS else PurePosixPath(name).stem
    if model not in _WEIGHTS:
        raise UserError(f"the package has no trained weights for {name!r}, only for {names()}")
    return str(_FOLDER / _WEIGHTS[model])


def default_device() -> str:
    """Returns the device that packaged models run on: "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
