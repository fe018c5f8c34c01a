"""The default detector learns: MultiPath heads on the packaged proposal model fit four images."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

from detectron2.config import get_cfg
from drawing import ROOT
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.data import register_datasets
from sharpmask_d2.engine.trainer import Trainer


def test_the_default_detector_fits_four_images(make_dataset, tmp_path):
    drawn = make_dataset(tmp_path, num_images=4, size=(96, 128), objects_per_image=3)
    register_datasets([("fit", str(drawn.annotations), str(drawn.image_root))])
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "detection" / "multipath_bifpn_lite0.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    # Backbone and proposal generator are those of the packaged proposal model, and stay frozen.
    cfg.MODEL.WEIGHTS = str(ROOT / "sharpmask_d2" / "model_zoo" / "bifpn_lite0.pth")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.MODEL.SHARPMASK.TEST.NUM_PROPOSALS = 60
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (96,), 96
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("fit",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.BASE_LR = 0.002
    cfg.SOLVER.WARMUP_ITERS = 5
    cfg.SOLVER.MAX_ITER = 20
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.DATASETS.TEST = ("fit",)
    results = Trainer.test(cfg, trainer.model)
    assert results["bbox"]["AP50"] > 80
    # Masks are those of the proposals, which are not trained here.
    assert results["segm"]["AP50"] > 60
