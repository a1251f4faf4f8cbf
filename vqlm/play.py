"""``vqlm play RUN``: a web page on this machine that lets a model write, for several users at once.

Who may: on a loopback address, everyone on this machine, and only pages of this server (a Host that
is no loopback name is refused, which ends DNS rebinding; so is what another site's page sends).
On any other address each request of the interface needs a token.  Bodies, lengths, sessions and
streams are bounded (``sessions.Limits``); nothing that a user sends is written or run.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vqlm import __version__
from vqlm.model import LM
from vqlm.sessions import Limits, Piece, Pool, Refused, Session, Wish
from vqlm.vocabulary import BYTES, Vocabulary

TOKEN_VARIABLE = "VQLM_PLAY_TOKEN"
"""Environment variable with the token; without it one is made up."""

GROWING_POSITION = 16_384
"""Most tokens of a text where the state grows with it ("softmax" mixers)."""

BODY_SECONDS = 30
"""Time within which a request's body must have come."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
_PAGES = {
    "/": ("play.html", "text/html; charset=utf-8"),
    "/play.js": ("play.js", "text/javascript; charset=utf-8"),
    "/play.css": ("play.css", "text/css; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether ``host`` is an address, or the name, of this machine alone."""
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host == "localhost"


def choose_token(host: str) -> str | None:
    """The token that an address needs: none on loopback unless ``VQLM_PLAY_TOKEN`` gives one.

    Raises:
        ValueError: a token of fewer than 16 characters, or of others than visible ASCII.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None if is_loopback(host) else secrets.token_urlsafe(24)
    if len(token) < 16 or not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            f"{TOKEN_VARIABLE} must be at least 16 characters of visible ASCII; leave it unset to "
            "have one made up"
        )
    return token


class Guard:
    """Refuses what other sites' pages send and what lacks the token; adds the security headers."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        refusal = self._refusal(scope["path"], Headers(scope=scope))
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        # A link from another site may open the page; only this page may use the interface.
        is_own = site in ("same-origin", "none") or path in _PAGES
        if not is_own or (origin and urlsplit(origin).netloc != headers.get("host")):
            return _error(403, "only the playground's own page may ask this")
        if self.token is not None and path.startswith("/api/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = secrets.compare_digest(given.encode(), self.token.encode())
            if kind.lower() != "bearer" or not same:
                return _error(401, "a token is needed; it is in the address that vqlm play printed")
        return None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error))


class Playground:
    """The requests that the page makes, over one model."""

    def __init__(
        self, model: LM, vocabulary: Vocabulary = BYTES, name: str = "model",
        limits: Limits = Limits(),  # noqa: B008  (immutable)
    ) -> None:  # fmt: skip
        self.model, self.vocabulary, self.name = model.eval(), vocabulary, name
        self.pool = Pool(lambda: Session(self.model, vocabulary), limits)

    def routes(self) -> list[Route]:
        """All of them."""
        text = "/api/texts/{name}"
        return [
            *(Route(path, self.page) for path in _PAGES),
            Route("/api/model", self.facts),
            Route("/api/texts", self.open, methods=["POST"]),
            Route(text, self.close, methods=["DELETE"]),
            Route(text + "/read", self.read, methods=["POST"]),
            Route(text + "/write", self.write, methods=["POST"]),
            Route(text + "/stop", self.stop, methods=["POST"]),
        ]

    def page(self, request: Request) -> Response:
        """The page and what belongs to it."""
        file, kind = _PAGES[request.url.path]
        content = (files("vqlm") / "web" / file).read_bytes()
        return Response(content, headers={"content-type": kind})

    def facts(self, request: Request) -> Response:
        """What the page tells of the model, and the limits that it keeps to."""
        config, limits = self.model.config, self.pool.limits
        width = next(self.model.parameters()).element_size()
        return JSONResponse({
            "name": self.name, "version": __version__, "mixers": config.mixers,
            "layers": config.n_layer, "width": config.d_model, "vocabulary": self.vocabulary.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "state_bytes": self.model.state_bytes(),
            "softmax_bytes_per_token":
                config.n_layer * config.kv_heads * (config.d_k + config.d_v) * width,
            "limits": vars(limits),
        })  # fmt: skip

    async def open(self, request: Request) -> Response:
        """A new text."""
        name = self.pool.open()
        return JSONResponse({"text": name, **_place(self.pool.get(name))}, 201)

    async def close(self, request: Request) -> Response:
        """Forgets a text."""
        self.pool.close(request.path_params["name"])
        return Response(status_code=204)

    async def stop(self, request: Request) -> Response:
        """Ends the reading or writing of a text after the slice that it is at."""
        session = self.pool.get(request.path_params["name"])
        session.stopped = True
        return JSONResponse(_place(session))

    async def read(self, request: Request) -> Response:
        """Takes in the body, a part of a text; ``?more=1`` if another part follows.

        Raises:
            Refused: text in another encoding, or too much of it.
        """
        session = self.pool.get(request.path_params["name"])
        body = await _body(request, self.pool.limits.body_bytes)
        self.pool.claim(session)
        try:
            try:
                more = request.query_params.get("more") == "1"
                tokens = await self.pool.do(session.tokens_of, body, more)
            except ValueError as error:
                raise Refused(400, str(error)) from error
            self._require_room(session, len(tokens))
            async for _ in self.pool.slices(session.read(tokens)):
                if await request.is_disconnected():
                    break
        finally:
            self.pool.release(session)
        return JSONResponse(_place(session))

    async def write(self, request: Request) -> Response:
        """Streams what the model writes as server-sent events, the last one with ``done``."""
        session = self.pool.get(request.path_params["name"])
        wish = _wish(await _body(request, self.pool.limits.body_bytes), self.pool.limits)
        self._require_room(session, wish.n_token)
        self.pool.claim(session)
        return _Stream(self._events(session, wish), lambda: self.pool.release(session))

    async def _events(self, session: Session, wish: Wish) -> AsyncIterator[bytes]:
        begun = time.monotonic()
        written, why, work = 0, "length", session.write(wish)
        try:
            async for piece in self.pool.slices(work):
                now = time.monotonic()
                rate, begun = piece.n_token / max(now - begun, 1e-9), now
                written += piece.n_token
                yield _event({**_told(piece), **_place(session), "tokens_per_second": rate})
                why = "end" if piece.ended else why
            if session.stopped:
                why = "stopped"
            yield _event({"done": why, "written": written, **_place(session)})
        finally:  # also when the user has gone, with a slice under way perhaps
            self.pool.later(work.close)

    def _require_room(self, session: Session, n_token: int) -> None:
        most = self.pool.limits.position
        if session.position + n_token > most:
            raise Refused(
                413, f"a text may have {most:,} tokens here, this one has {session.position:,}; "
                "start a new one",
            )  # fmt: skip


class _Stream(StreamingResponse):
    """Server-sent events; ``at_end`` is called whatever happens, even if none was sent."""

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def _told(piece: Piece) -> dict[str, Any]:
    return {"delta": piece.text, "tokens": piece.n_token}


def _place(session: Session) -> dict[str, Any]:
    return {"position": session.position, "state_bytes": session.state_bytes()}


async def _body(request: Request, most: int) -> bytes:
    """The body of a request, if it has at most ``most`` bytes and comes in time.

    Raises:
        Refused: it has more, or is late.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > 64 * most:  # until then read on, so that the answer gets through
                    break
    except TimeoutError as error:
        raise Refused(408, f"the request did not come within {BODY_SECONDS} seconds") from error
    except ClientDisconnect as error:
        raise Refused(400, "the request ended early") from error
    if size > most:
        raise Refused(413, f"a request may have {most:,} bytes; send a text in parts")
    return b"".join(parts)


def _wish(body: bytes, limits: Limits) -> Wish:
    """What is to be written, from JSON.

    Raises:
        Refused: not that, or more than is given.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "n_token": (int,), "temperature": (int, float), "top_p": (int, float), "seed": (int,),
        "may_end": (bool,),
    }  # fmt: skip
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict) or "n_token" not in fields:
            raise ValueError("wanted a JSON object with n_token")
        for name, value in fields.items():
            if type(value) not in kinds.get(name, ()):
                raise ValueError(f"{name}={value!r} is unknown or of another type")
        wish = Wish(**fields)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"cannot read the request: {error}") from error
    if not 1 <= wish.n_token <= limits.new_tokens:
        raise Refused(413, f"n_token={wish.n_token}, but it must be 1 to {limits.new_tokens:,}")
    if not (0 <= wish.temperature <= 100 and math.isfinite(wish.temperature)):
        raise Refused(400, f"temperature={wish.temperature}, but it must be 0 to 100")
    if not 0 < wish.top_p <= 1:
        raise Refused(400, f"top_p={wish.top_p}, but it must be in (0, 1]")
    if wish.seed is not None and not 0 <= wish.seed < 2**63:
        raise Refused(400, f"seed={wish.seed}, but it must be 0 or a positive 63-bit number")
    return wish


def application(playground: Playground, host: str, token: str | None) -> Starlette:
    """The web application, as it is served at address ``host``."""
    # Elsewhere than on loopback the token is what counts: the machine may have any name.
    hosts = list(_LOOPBACK) if is_loopback(host) else ["*"]
    if host not in hosts:
        hosts.append(host)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        playground.pool.shut_down()

    return Starlette(
        routes=playground.routes(),
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
            Middleware(Guard, token=token),
        ],
        exception_handlers={Refused: _on_refused},
        lifespan=lifespan,
    )


def serve(playground: Playground, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serves until Ctrl-C; ``announce`` is given the address once it is listened at.

    Raises:
        ValueError: a token that ``choose_token`` refuses, or no such host.
        OSError: the port is taken, say.
    """
    token = choose_token(host)
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port {port}, but it must be 0 (a free one) to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"no such address: {host} ({error}); 127.0.0.1 is this machine") from error
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}, port {port} ({error.strerror}); give another --port, "
                "0 takes a free one"
            ) from error
        listener.listen()  # from here on who comes waits, and is not turned away
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/"
        # The part behind # stays in the browser: no server and no log sees it.
        announce(url if token is None else f"{url}#token={token}")
        config = uvicorn.Config(
            application(playground, host, token), log_level="warning", access_log=False,
            server_header=False, date_header=False, proxy_headers=False, ws="none",
            limit_concurrency=4 * playground.pool.limits.streams + 64, timeout_graceful_shutdown=2,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listener])
