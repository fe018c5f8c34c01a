"""What the server of the page answers, and what it refuses."""

import http.client
import json
import socket
import sys

import pytest
from sharpmask_d2.app import server
from sharpmask_d2.errors import UserError


def _ask(site, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(site, timeout=60)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, content


def test_the_page_loads_nothing_from_other_servers(site):
    answer, content = _ask(site, "GET", "/")
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert b"fonts.googleapis.com" not in content
    _, theme = _ask(site, "GET", "/theme.css")
    assert b"@import" not in theme


@pytest.mark.parametrize(
    "path",
    [
        "/file=/etc/passwd",
        f"/file={__file__}",
        f"/gradio_api/file={__file__}",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file=https://example.org/",
        "/gradio_api/proxy=https://example.hf.space/",
        "/gradio_api/stream/a",
        "/gradio_api/info",
        "/assets/../../../routes.py",
        "/assets/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "/static/%2fetc/passwd",
        "/static/../../routes.py",
        "/docs",
        "/openapi.json",
        "/monitoring",
    ],
)
def test_no_file_and_no_other_server_is_readable(site, path):
    answer, content = _ask(site, "GET", path)
    assert answer.status in (403, 404)
    assert b"root:" not in content
    assert b"import" not in content


@pytest.mark.parametrize(
    "path", ["/gradio_api/upload", "/upload", "/gradio_api/run/predict", "/gradio_api/component_server"]
)
def test_nothing_is_uploaded(site, path):
    assert _ask(site, "POST", path, b"{}")[0].status == 403


def test_a_secret_picture_is_not_found_by_its_address(site):
    assert _ask(site, "GET", "/photograph/.jpg")[0].status == 404
    assert _ask(site, "GET", "/photograph/a.jpg")[0].status == 404


@pytest.mark.parametrize(
    "value",
    [
        {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
        {"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}},
        [{"deep": [{"url": "https://example.org/a.png"}]}],
    ],
)
def test_a_request_cannot_name_a_file(site, value):
    body = json.dumps({"data": [value], "fn_index": 0, "session_hash": "a"})
    for text in (body, body.replace("path", "\\u0070ath").replace("url", "\\u0075rl")):
        answer, content = _ask(site, "POST", "/gradio_api/queue/join", text, Content_Type="application/json")
        assert (answer.status, content) == (403, b"The request names a file.")


def test_other_pages_and_other_names_are_refused(site):
    for name in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", ""):
        assert _ask(site, "GET", "/", Host=name)[0].status == 403
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "a"})
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert _ask(site, "POST", "/gradio_api/queue/join", body, Origin=origin)[0].status == 403


def test_a_request_that_is_too_large_is_refused(site):
    assert _ask(site, "POST", "/gradio_api/queue/join", b" " * 600_000)[0].status == 413


def test_without_gradio_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio is not installed: run pip install 'sharpmask_d2\[app\]'"):
        server.make_app(max_bytes=1, max_pixels=1)


def test_listens_on_this_machine_only(site, monkeypatch, capsys):
    import uvicorn

    listeners = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: listeners.extend(s.getsockname() for s in sockets))
    monkeypatch.setattr(server, "make_app", lambda **options: None)
    server.serve(port=0)
    assert listeners[0][0] == "127.0.0.1"
    assert f"http://127.0.0.1:{listeners[0][1]}" in capsys.readouterr().out
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another port"):
        server.serve(port=taken.getsockname()[1])
