"""The default model as ONNX graphs."""

import pytest

# Small images, so that a test takes a tenth of a second for each.
SIDES = ["INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "192"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The folder of the default model for images of 128 to 192 pixels, exported as ONNX."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    from sharpmask_d2.export import export_model
    from sharpmask_d2.model_zoo import DEFAULT

    folder = tmp_path_factory.mktemp("exported")
    export_model(output=str(folder), to="onnx", model=DEFAULT, opts=SIDES)
    return folder
