"""Serves the page: which requests it answers, and on which address.

Gradio has routes for files, uploads and other servers, which this page does not need. Only the routes in `_GET` and `_POST` are answered.
"""

import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Optional

from ..errors import UserError
from ..extras import APP, import_extra
from .models import SharedModels
from .photographs import find_examples
from .sessions import Sessions

_Message = MutableMapping[str, Any]
_App = Callable[[_Message, Callable[[], Awaitable[_Message]], Callable[[_Message], Awaitable[None]]], Awaitable[None]]

# Sessions in memory: each holds one photograph, its masks and the features of one image.
_SESSIONS = 8
_LOCAL = ("127.0.0.1", "localhost", "::1")
# What the page fetches: paths, and folders that end in "/".
_GET = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/assets/",
    "/static/",
    "/photograph/",
    "/gradio_api/queue/data",
    "/gradio_api/heartbeat/",
)
_POST = ("/gradio_api/queue/join", "/gradio_api/cancel")
# Gradio builds functions from text, hence 'unsafe-eval'. Nothing is loaded from, or sent to, another server.
_HEADERS = {
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    b"frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Guard:
    """An ASGI application in front of the page that refuses every request that the page does not need."""

    def __init__(self, app: _App, *, hosts: Optional[Sequence[str]], max_body: int):
        """
        Args:
            app: the page.
            hosts: names under which the page may be asked for, without a port; None for any. A fixed list keeps other pages in the user's
                browser from reaching this one under a name of their own.
            max_body: maximum size of a request in bytes.
        """
        self._app, self._hosts, self._max_body = app, hosts, max_body

    async def __call__(
        self, scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]
    ) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        if reason := self._refusal(scope["method"], scope["path"], headers):
            await _answer(send, 403, reason)
            return
        if scope["method"] == "POST":
            body = await _read(receive, self._max_body)
            if body is None:
                await _answer(send, 413, "The request is too large.")
                return
            if not _is_plain(body):
                await _answer(send, 403, "The request names a file.")
                return
            receive = _replay(body, receive)

        async def send_safely(message: _Message) -> None:
            if message["type"] == "http.response.start":
                given = [pair for pair in message.get("headers", []) if pair[0].lower() not in _HEADERS]
                message = {**message, "headers": [*given, *_HEADERS.items()]}
            await send(message)

        await self._app(scope, receive, send_safely)

    def _refusal(self, method: str, path: str, headers: dict[bytes, bytes]) -> str:
        """Why a request is refused, or an empty text."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and _without_port(host) not in self._hosts:
            return "The page does not have this name."
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin.partition("://")[2] != host:
            return "The request comes from another page."
        allowed = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method, ())
        if not any(path == one or (one != "/" and one.endswith("/") and path.startswith(one)) for one in allowed):
            return "The page does not have this address."
        return "The address is not valid." if ".." in path or "://" in path or "\\" in path else ""


def make_app(
    *,
    max_bytes: int,
    max_pixels: int,
    hosts: Optional[Sequence[str]] = _LOCAL,
    examples: Sequence[Path] = (),
    model: Optional[str] = None,
) -> _App:
    """Makes the ASGI application that serves the page.

    Args:
        max_bytes: maximum size of the file of an image.
        max_pixels: maximum number of pixels of an image.
        hosts: see `Guard`. Default: the names of this machine for itself.
        examples: image files that the page offers.
        model: name of the packaged model that is chosen at first; None for the default.

    Raises:
        UserError: Gradio is not installed, or there is no such model.
    """
    # Gradio reads these when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    gr = import_extra("gradio", requirement=APP)
    from fastapi import FastAPI, Response

    from .page import CSS, Limits, build_page, theme

    models = SharedModels()
    names = models.names()
    if model is not None and model not in names:
        raise UserError(f"there is no packaged model {model!r} of proposals: choose from {names}")
    first = model or names[0]
    # Loaded before the first user asks for it.
    models.get(first)
    sessions = Sessions(models, capacity=_SESSIONS)
    page = build_page(sessions, names, limits=Limits(max_bytes, max_pixels), examples=examples, model=first)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/photograph/{picture_id}.jpg")
    def photograph(picture_id: str) -> Response:
        content = sessions.picture(picture_id)
        if content is None:
            return Response(status_code=404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=max_bytes,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )
    # base64 has four characters for three bytes.
    return Guard(app, hosts=hosts, max_body=max_bytes * 4 // 3 + 100_000)


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_megabytes: int = 20,
    max_megapixels: int = 16,
    input: Optional[Sequence[str]] = None,
    model: Optional[str] = None,
) -> None:
    """Serves the page until Ctrl-C.

    Args:
        host: address to listen on. Other addresses than this machine's own let others use the page: everyone who reaches the port.
        port: to listen on; 0 takes a free one.
        max_megabytes: maximum size of the file of an image.
        max_megapixels: maximum number of pixels of an image, in millions.
        input: image files and folders whose images the page offers, at most 12; None offers the photographs of scikit-image, if installed.
        model: name of the packaged model that is chosen at first; None for the default.

    Raises:
        UserError: the address cannot be listened on; see also `make_app`.
        FileNotFoundError: see `inference.image_files.list_inputs`.
    """
    # Imported here, since it loads more than a test of the page needs.
    from ..inference.image_files import list_inputs

    examples = [image.path for image in list_inputs(input)][:12] if input else find_examples()
    local = host in _LOCAL
    app = make_app(
        max_bytes=max_megabytes * 1_000_000,
        max_pixels=max_megapixels * 1_000_000,
        hosts=_LOCAL if local else None,
        examples=examples,
        model=model,
    )
    import uvicorn

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"the page cannot listen on --host {host} --port {port}: {error.strerror}; choose another port with --port"
        ) from None
    with listener:
        name = f"[{host}]" if ":" in host else host
        print(f"The page is at http://{name}:{listener.getsockname()[1]} - Ctrl-C ends it", flush=True)
        if not local:
            print("Everyone who reaches this address can use the page; it has no passwords.", flush=True)
        logging.getLogger("httpx").setLevel(logging.WARNING)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.run(sockets=[listener])


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


async def _read(receive: Callable[[], Awaitable[_Message]], limit: int) -> Optional[bytes]:
    """The body of a request; None if it is larger than the limit or does not arrive whole."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes, receive: Callable[[], Awaitable[_Message]]) -> Callable[[], Awaitable[_Message]]:
    """A `receive` that gives the body first."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> _Message:
        return left.pop() if left else await receive()

    return replayed


def _is_plain(body: bytes) -> bool:
    """Whether a request is JSON without files: Gradio would open a file, or fetch an address, that the request names."""

    def check(pairs: dict[str, Any]) -> dict[str, Any]:
        if "path" in pairs or "meta" in pairs or "url" in pairs:
            raise ValueError("a file")
        return pairs

    try:
        json.loads(body or b"{}", object_hook=check)
    except (ValueError, RecursionError):
        return False
    return True


async def _answer(send: Callable[[_Message], Awaitable[None]], status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *_HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
