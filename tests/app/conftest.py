"""A drawn photograph and the packaged models, for the tests of the page."""

import threading
import time

import pytest
from photograph_files import draw_photograph
from sharpmask_d2.app.models import SharedModels
from sharpmask_d2.app.photographs import Photograph


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
