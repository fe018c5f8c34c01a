"""The trainer: data loaders, optimizer, mixed precision, exact resuming and evaluation on top of Detectron2's DefaultTrainer."""

import logging
import weakref
from collections import OrderedDict
from typing import Optional

import torch
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..checkpoint import SafeCheckpointer
from ..data import (
    ResumableLoader,
    build_jitter_train_loader,
    build_patch_test_loader,
    build_patch_train_loader,
    build_proposal_test_loader,
    build_proposal_train_loader,
    build_resumable_train_loader,
)
from ..data.proposal_mapper import find_test_file
from ..data.seeding import STEPS, seed_all
from ..errors import UserError
from ..evaluation import (
    GeneratedProposalEvaluator,
    PatchEvaluator,
    ProposalEvaluator,
    WithGeneratedProposals,
    evaluate_proposal_file,
)
from ..modeling.meta_arch import ALONE, ARCHITECTURE
from ..modeling.roi_heads import ProposalMaskRes5ROIHeads, ProposalMaskROIHeads

# These and Detectron2's own, an RPN alone, give proposals and no detections.
_PROPOSAL_NETWORKS = (*ALONE, "ProposalNetwork")
# Proposal generators whose proposals can be evaluated within a detector.
_GENERATORS = ("SharpMask", "SharpMaskFPN")


def reads_proposal_masks(cfg) -> bool:
    """Whether the model is a detector whose detections have the masks of precomputed proposals."""
    model = cfg.MODEL
    return (
        model.LOAD_PROPOSALS
        and model.META_ARCHITECTURE not in ALONE
        and issubclass(ROI_HEADS_REGISTRY.get(model.ROI_HEADS.NAME), (ProposalMaskROIHeads, ProposalMaskRes5ROIHeads))
        and model.SHARPMASK.DETECTION_MASKS == "proposal"
    )


def makes_proposals(cfg) -> bool:
    """Whether the model is a detector with an online generator of this package."""
    return cfg.MODEL.META_ARCHITECTURE not in ALONE and cfg.MODEL.PROPOSAL_GENERATOR.NAME in _GENERATORS


class _DepthwiseInFloat32(TorchFunctionMode):
    """A context in which autocast does not cast depthwise convolutions that are trained: on a CPU their gradients are slow in bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.conv2d or not torch.is_grad_enabled() or not _is_learning_depthwise(*args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(args[0].float(), *args[1:], **kwargs)


def _is_learning_depthwise(_, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    """Of the arguments of `conv2d`: one channel for each group, and a gradient."""
    return groups > 1 and weight.shape[1] == 1 and weight.requires_grad


class _SeedStep(hooks.HookBase):
    """Seeds each step by its iteration and rank, so that a resumed training draws the same dropout as one that was not interrupted."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_step(self):
        seed_all(self.seed, comm.get_rank(), self.trainer.iter, STEPS)


class _PatchPrinter(EventWriter):
    """Logs how good masks and scores of the training patches are, which Detectron2's printer leaves out."""

    def __init__(self):
        self.logger = logging.getLogger(__name__)

    def write(self):
        storage = get_event_storage()
        shown = [
            f"{name}: {storage.history(name).median(20):.4f}"
            for name in ("patch_iou", "score_accuracy")
            if name in storage.histories()
        ]
        if shown:
            self.logger.info(f" iter: {storage.iter}  {'  '.join(shown)}")


class Trainer(DefaultTrainer):
    """Detectron2's DefaultTrainer, with what this package's models need.

    With SEED >= 0, a run that resumes from a checkpoint computes what an uninterrupted run computes. A run that diverges stops before a
    checkpoint with numbers that are not finite is written.
    """

    def __init__(self, cfg):
        """
        Args:
            cfg: a config with this package's keys.
        """
        mixed = cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.MIXED_PRECISION
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        self._cpu_autocast = mixed and on_cpu
        cfg = cfg.clone()
        cfg.defrost()
        # Detectron2's AMPTrainer insists on CUDA.
        cfg.SOLVER.AMP.ENABLED = mixed and not on_cpu
        cfg.freeze()
        super().__init__(cfg)

    def run_step(self):
        if not self._cpu_autocast:
            super().run_step()
            return
        # bfloat16 needs no scaling of losses.
        with torch.autocast("cpu", dtype=torch.bfloat16), _DepthwiseInFloat32():
            super().run_step()

    def build_hooks(self):
        # Before the hooks, which hold it; Detectron2 has no method that builds it.
        self.checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        seeding = [_SeedStep(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        return seeding + super().build_hooks()

    def build_writers(self):
        return [*super().build_writers(), _PatchPrinter()]

    def resume_or_load(self, resume: bool = True):
        super().resume_or_load(resume)
        if isinstance(self._trainer.data_loader, ResumableLoader):
            self._trainer.data_loader.start = self.start_iter

    # Detectron2 0.6 leaves the optimizer out of its checkpoints, so that a resumed run would lose its momentum; later ones do this.
    def state_dict(self):
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        # Convolutions run faster in this layout on CPUs and on CUDA; results and checkpoints do not depend on it.
        return super().build_model(cfg).to(memory_format=torch.channels_last)

    @classmethod
    def build_train_loader(cls, cfg):
        if cfg.MODEL.META_ARCHITECTURE == ARCHITECTURE:
            return build_patch_train_loader(cfg)
        if reads_proposal_masks(cfg):
            return build_proposal_train_loader(cfg)
        if cfg.INPUT.SCALE_JITTER.ENABLED:
            return build_jitter_train_loader(cfg)
        return build_resumable_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        if reads_proposal_masks(cfg):
            return build_proposal_test_loader(cfg, dataset_name)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        if cfg.MODEL.META_ARCHITECTURE in _PROPOSAL_NETWORKS:
            return ProposalEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)
        return COCOEvaluator(dataset_name, output_dir=cfg.OUTPUT_DIR)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate a model in the way that fits its architecture.

        The stand-alone network: its patches and the average recall of its proposals, as MODEL.SHARPMASK.TEST asks for. A detector: COCO's
        AP; and, where it makes its own proposals, their average recall, too (unless MODEL.SHARPMASK.TEST.FULL_IMAGES is off).

        Args:
            cfg: reads DATASETS.TEST.
            model: with its weights.
            evaluators: used instead of all this, as in Detectron2's `test`; default: None.

        Returns:
            dict of results; with several datasets, one such dict for each name. Of the stand-alone network: patches, segm and bbox; of a
            detector: bbox, segm if it has masks, proposal_bbox and proposal_segm.
        """
        if evaluators is not None:
            return super().test(cfg, model, evaluators)
        evaluate = cls._test_network if cfg.MODEL.META_ARCHITECTURE in _PROPOSAL_NETWORKS else cls._test_detector
        return _for_each_dataset(cfg, lambda name: evaluate(cfg, model, name))

    @classmethod
    def test_proposal_files(cls, cfg):
        """Average recall of the files of DATASETS.PROPOSAL_FILES_TEST, which training does not change.

        Returns:
            dict of results: proposal_bbox and, if the file has masks, proposal_segm; with several datasets, one such dict for each name.
        """
        return _for_each_dataset(
            cfg,
            lambda name: evaluate_proposal_file(name, find_test_file(cfg, name), output_dir=cfg.OUTPUT_DIR),
        )

    @classmethod
    def _test_network(cls, cfg, model, name: str) -> dict:
        test, results = cfg.MODEL.SHARPMASK.TEST, {}
        if test.PATCHES_PER_IMAGE and cfg.MODEL.META_ARCHITECTURE == ARCHITECTURE:
            results.update(inference_on_dataset(model, build_patch_test_loader(cfg, name), PatchEvaluator()))
        if test.FULL_IMAGES:
            loader = build_detection_test_loader(cfg, name)
            results.update(inference_on_dataset(model, loader, cls.build_evaluator(cfg, name)))
        return results

    @classmethod
    def _test_detector(cls, cfg, model, name: str) -> dict:
        evaluator = cls.build_evaluator(cfg, name)
        if makes_proposals(cfg) and cfg.MODEL.SHARPMASK.TEST.FULL_IMAGES:
            # In one pass: on a CPU the generator takes most of the time.
            model = WithGeneratedProposals(model)
            evaluator = DatasetEvaluators([evaluator, GeneratedProposalEvaluator(name, output_dir=cfg.OUTPUT_DIR)])
        return inference_on_dataset(model, cls.build_test_loader(cfg, name), evaluator)


def _for_each_dataset(cfg, evaluate) -> dict:
    """Evaluates and prints each of DATASETS.TEST; the results by name, of a single one its own."""
    results = OrderedDict()
    for name in cfg.DATASETS.TEST:
        results[name] = evaluate(name)
        if comm.is_main_process():
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def build_optimizer(cfg, model: nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW with a learning rate of its own for the trunk or backbone.

    Args:
        cfg: a config; of SOLVER it reads OPTIMIZER, TRUNK_MULTIPLIER, BASE_LR, MOMENTUM, NESTEROV, BIAS_LR_FACTOR, the three WEIGHT_DECAY
            keys and CLIP_GRADIENTS.
        model: parameters below a module named `trunk` or `backbone` (of a detector, a feature pyramid included) get the factor.

    Raises:
        UserError: an optimizer that is neither.
    """
    solver = cfg.SOLVER
    params = optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        trunk_multiplier=solver.TRUNK_MULTIPLIER,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    if solver.OPTIMIZER == "SGD":
        sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        return sgd(params, lr=solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    if solver.OPTIMIZER == "ADAMW":
        return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, lr=solver.BASE_LR)
    raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: choose 'SGD' or 'ADAMW'")


def optimizer_params(
    model: nn.Module,
    *,
    base_lr: float,
    trunk_multiplier: float = 1.0,
    bias_lr_factor: float = 1.0,
    weight_decay: float = 0.0,
    weight_decay_norm: float = 0.0,
    weight_decay_bias: Optional[float] = None,
) -> list:
    """Parameter groups for an optimizer: those of Detectron2's `get_default_optimizer_params`, and a factor for the trunk.

    Args:
        model: whose trainable parameters are grouped. Those below a module named `trunk` or `backbone` have the learning rate `base_lr` *
            `trunk_multiplier`.
        base_lr: learning rate of all other parameters.
        trunk_multiplier: factor on the learning rate of the trunk; default: 1.
        bias_lr_factor: factor on the learning rate of biases; default: 1.
        weight_decay: of all parameters but norms and biases; default: 0.
        weight_decay_norm: of the parameters of norms; default: 0.
        weight_decay_bias: of biases; default: None, that of the layer that they belong to.

    Returns:
        list of dicts with params, lr and weight_decay.
    """
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
    )
    if trunk_multiplier == 1:
        return groups
    trunk = {
        parameter
        for name, parameter in model.named_parameters()
        if not {"trunk", "backbone"}.isdisjoint(name.split("."))
    }
    split = [
        {**group, "lr": group["lr"] * factor, "params": [p for p in group["params"] if (p in trunk) == in_trunk]}
        for in_trunk, factor in ((True, trunk_multiplier), (False, 1.0))
        for group in groups
    ]
    return [group for group in split if group["params"]]
