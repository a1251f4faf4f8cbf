"""A playground with a tiny model, served on loopback by a thread of the test."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from tiny import MODEL

from vqlm.model import LM
from vqlm.play import Playground, application
from vqlm.sessions import Limits


def tiny_model() -> LM:
    """Small enough for thousands of tokens in seconds; codes far apart, so that all are used."""
    torch.manual_seed(3)
    model = LM(dataclasses.replace(MODEL, n_layer=1, block=512)).eval()
    for book in model.codebooks():
        if book is not None:
            book.key_sum.copy_(torch.randn_like(book.key_sum))
    return model


class Client:
    """Speaks to a playground as its page does."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if isinstance(body, dict):
                body = json.dumps(body)
            connection.request(method, path, body, self.headers | (headers or {}))
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, named, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be a success."""
        status, _, content = self.ask(method, path, body)
        assert status < 300, content
        return json.loads(content) if content else None

    def refusal(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and message of an answer that must be a refusal."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        status, _, content = self.ask(method, path, body, named)
        assert status >= 400, content
        return status, json.loads(content)["error"]

    def open(self) -> str:
        """The path of a new text."""
        return "/api/texts/" + str(self.json("POST", "/api/texts")["text"])

    def write(self, text: str, **wish: Any) -> list[dict[str, Any]]:
        """All events of a stream."""
        _, headers, content = self.ask("POST", text + "/write", wish)
        assert headers["content-type"].startswith("text/event-stream"), content
        return [json.loads(part[len("data: ") :]) for part in content.decode().split("\n\n")[:-1]]


@contextmanager
def served(
    model: LM | None = None, limits: Limits = Limits(), token: str | None = None,  # noqa: B008
    host: str = "127.0.0.1", **more: Any,
) -> Iterator[tuple[Playground, Client]]:  # fmt: skip
    """A playground and a client of it; ``host`` is what it takes its address for."""
    playground = Playground(model or tiny_model(), name="tiny", limits=limits, **more)
    config = uvicorn.Config(
        application(playground, host, token), log_level="warning", access_log=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield playground, Client(port, token)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
