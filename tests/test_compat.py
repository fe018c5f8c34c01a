"""Missing names are supplied to Detectron2 only if its sources use them.

Each case is a process with a package `detectron2` of a few lines.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lines of the main branch of Detectron2.
CURRENT = {
    "__init__.py": "__version__ = '0.6'",
    "data/transforms/transform.py": "def resize(interp=Image.BILINEAR): ...",
    "structures/masks.py": "mask = np.zeros((2, 2)).astype(bool)",
    "evaluation/sem_seg_evaluation.py": "pred = np.array(output, dtype=int)",
    "evaluation/coco_evaluation.py": "try:\n    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
    "except ImportError:\n    pass",
    "layers/deform_conv.py": "try:\n    from detectron2 import _C\nexcept ImportError:\n    pass",
    "export/__init__.py": "try:\n    from caffe2.proto import caffe2_pb2\nexcept ImportError:\n    pass\n"
    "else:\n    from .api import *",
}
# Lines of the release on PyPI, and the names that are supplied for them.
OLD = {
    "data/transforms/transform.py": ("def resize(interp=Image.LINEAR): ...", {"PIL.Image.LINEAR"}),
    "structures/masks.py": ("mask = np.zeros((2, 2)).astype(np.bool)", {"numpy.bool"}),
    "evaluation/sem_seg_evaluation.py": (
        "pred = np.array(output, dtype=np.int)\nacc = np.zeros(1, dtype=np.float)",
        {"numpy.int", "numpy.float"},
    ),
    "evaluation/coco_evaluation.py": (
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt",
        {"detectron2._C", "detectron2.evaluation.fast_eval_api"},
    ),
    "layers/deform_conv.py": (
        "from detectron2 import _C",
        {"detectron2._C", "detectron2.evaluation.fast_eval_api"},
    ),
    "export/__init__.py": ("from .api import *", {"detectron2.export.api"}),
}
RUN = """
import json, runpy, sys
import numpy, PIL.Image
names = "bool", "int", "float", "object", "str"
for name in names:
    vars(numpy).pop(name, None)
vars(PIL.Image).pop("LINEAR", None)
runpy.run_path(sys.argv[1])
found = [f"numpy.{name}" for name in names if name in vars(numpy)]
found += ["PIL.Image.LINEAR"] if hasattr(PIL.Image, "LINEAR") else []
modules = "detectron2._C", "detectron2.evaluation.fast_eval_api", "detectron2.export.api"
print(json.dumps(found + [name for name in modules if name in sys.modules]))
"""


def supplied(folder: Path, sources: dict) -> set:
    """Names that `sharpmask_d2.compat` supplies to a Detectron2 with these sources and current libraries."""
    for name, text in sources.items():
        path = folder / "detectron2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    command = [sys.executable, "-c", RUN, str(ROOT / "sharpmask_d2" / "compat.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_nothing_is_supplied_to_the_main_branch(tmp_path):
    assert supplied(tmp_path, CURRENT) == set()


@pytest.mark.parametrize("path", OLD)
def test_each_name_is_supplied_if_a_source_uses_it(tmp_path, path):
    source, expected = OLD[path]
    assert supplied(tmp_path, {**CURRENT, path: source}) == expected


def test_existing_modules_are_not_replaced(tmp_path):
    # Compiled operators and Caffe2 exist.
    (tmp_path / "caffe2").mkdir()
    (tmp_path / "caffe2" / "__init__.py").write_text("")
    old = {path: source for path, (source, _) in OLD.items()}
    names = {"PIL.Image.LINEAR", "numpy.bool", "numpy.int", "numpy.float"}
    assert supplied(tmp_path, {**CURRENT, **old, "_C.py": ""}) == names
