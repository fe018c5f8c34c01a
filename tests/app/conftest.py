"""A drawn photograph and the packaged models, for the tests of the page."""

import io
import threading
import time

import cv2
import numpy as np
import pytest
from PIL import Image
from sharpmask_d2.app.models import SharedModels
from sharpmask_d2.app.photographs import Photograph


def draw_photograph():
    """(96, 128, 3) uint8 BGR: a bright disc and a dark square on grey."""
    pixels = np.full((96, 128, 3), 110, np.uint8)
    cv2.circle(pixels, (40, 48), 26, (40, 60, 230), -1)
    cv2.rectangle(pixels, (84, 30), (116, 62), (60, 30, 20), -1)
    return pixels


def as_png(pixels):
    """The bytes of a PNG file of BGR pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, ::-1]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def models():
    return SharedModels()


@pytest.fixture
def photograph():
    return Photograph("disc.png", draw_photograph())


@pytest.fixture(scope="session")
def site():
    """Address of the page, served by a thread of this process for the whole run."""
    pytest.importorskip("gradio", reason="the page needs Gradio, which .venv/app has: see the Makefile")
    import uvicorn
    from sharpmask_d2.app.server import make_app

    app = make_app(max_bytes=300_000, max_pixels=1_000_000)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
