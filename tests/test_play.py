"""The playground over HTTP: what it gives, to whom, and how much."""

import http.client
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from playground import Client, served, tiny_model

from vqlm import checkpoint, play
from vqlm.cli import main
from vqlm.model import LM
from vqlm.play import Playground, choose_token, is_loopback
from vqlm.sessions import Limits

TOKEN = "a-token-of-this-test"
GREEDY = {"temperature": 0, "top_p": 1}


@pytest.fixture(scope="module")
def model() -> LM:
    return tiny_model()


def wait_until_idle(playground: Playground) -> None:
    """The answer's last byte may come a moment before the text is free again."""
    ends = time.monotonic() + 20
    while playground.pool.working:
        assert time.monotonic() < ends
        time.sleep(0.02)


def texts(events: list[dict[str, Any]]) -> str:
    return "".join(event.get("delta", "") for event in events)


def test_reads_and_streams(model: LM) -> None:
    with served(model) as (playground, client):
        facts = client.json("GET", "/api/model")
        assert facts["name"] == "tiny" and facts["state_bytes"] == model.state_bytes()
        text = client.open()
        told = client.json("POST", text + "/read", b"state linear ")
        assert told == {"position": 13, "state_bytes": model.state_bytes()}
        events = client.write(text, n_token=300, **GREEDY)
        assert events[-1] == {
            "done": "length", "written": 300, "position": 313, "state_bytes": model.state_bytes(),
        }  # fmt: skip
        assert sum(event["tokens"] for event in events[:-1]) == 300
        assert all(event["tokens_per_second"] > 0 for event in events[:-1])
        assert [e["position"] for e in events] == sorted(e["position"] for e in events)
        assert client.ask("DELETE", text)[0] == 204
        assert client.refusal("POST", text + "/stop") == (
            404, "this text is no longer remembered; start a new one",
        )  # fmt: skip
        wait_until_idle(playground)


def test_the_page_is_served_with_its_policy(model: LM) -> None:
    with served(model) as (_, client):
        for path, start in (("/", b"<!doctype html>"), ("/play.js", b"//"), ("/style.css", b"/*")):
            status, headers, content = client.ask("GET", path)
            assert status == 200 and content.startswith(start)
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
        assert client.ask("GET", "/web/report.html")[0] == 404
        assert client.ask("GET", "/../pyproject.toml")[0] == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:8765", "[::1]:8765"])
def test_loopback_names_are_welcome(model: LM, host: str) -> None:
    with served(model) as (_, client):
        assert client.ask("GET", "/api/model", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.9:8765", ""])
def test_a_rebound_name_is_refused(model: LM, host: str) -> None:
    with served(model) as (_, client):
        assert client.ask("GET", "/api/model", headers={"Host": host})[0] == 400
        assert client.ask("GET", "/", headers={"Host": host})[0] == 400


def test_other_sites_pages_are_refused(model: LM) -> None:
    with served(model) as (playground, client):
        for headers in ({"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
                        {"Origin": "http://evil.example"}, {"Origin": "null"}):  # fmt: skip
            status, why = client.refusal("POST", "/api/texts", **headers)
            assert status == 403 and "own page" in why
        assert len(playground.pool) == 0
        own = {"Sec-Fetch-Site": "same-origin", "Origin": f"http://127.0.0.1:{client.port}"}
        assert client.ask("POST", "/api/texts", headers=own)[0] == 201
        # A link from elsewhere may open the page.
        assert client.ask("GET", "/", headers={"Sec-Fetch-Site": "cross-site"})[0] == 200


def test_a_token_is_needed_where_there_is_one(model: LM) -> None:
    with served(model, token=TOKEN, host="0.0.0.0") as (playground, client):
        text = client.open()
        for wrong in (None, "", "a-token-of-this-tesT", TOKEN + "x", TOKEN[:-1], "é" * 20):
            stranger = Client(client.port)
            given = {} if wrong is None else {"Authorization": f"Bearer {wrong}"}
            for method, path in (
                ("GET", "/api/model"), ("POST", "/api/texts"), ("POST", text + "/stop"),
                ("POST", text + "/write"), ("POST", text + "/read"), ("DELETE", text),
            ):  # fmt: skip
                assert stranger.refusal(method, path, b"{}", **given)[0] == 401
        assert Client(client.port).refusal(
            "GET", "/api/model", Authorization="Basic " + TOKEN
        )[0] == 401  # fmt: skip
        assert Client(client.port).ask("GET", "/")[0] == 200  # the page, which asks for it
        assert client.ask("GET", "/api/model", headers={"Host": "my-server:8765"})[0] == 200
        assert len(playground.pool) == 1


def test_who_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(play.TOKEN_VARIABLE, raising=False)
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "me.example", "")] == [False] * 5
    assert choose_token("127.0.0.1") is None
    made = {choose_token("0.0.0.0") for _ in range(3)}
    assert len(made) == 3 and all(token and len(token) >= 32 for token in made)
    monkeypatch.setenv(play.TOKEN_VARIABLE, TOKEN)
    assert choose_token("127.0.0.1") == choose_token("0.0.0.0") == TOKEN
    for bad in ("short", "with a space in the middle", "ünsichtbare-zeichen"):
        monkeypatch.setenv(play.TOKEN_VARIABLE, bad)
        with pytest.raises(ValueError, match="at least 16 characters of visible ASCII"):
            choose_token("0.0.0.0")


def test_bodies_are_bounded(model: LM) -> None:
    with served(model, Limits(body_bytes=1000)) as (_, client):
        text = client.open()
        assert client.json("POST", text + "/read", b"x" * 1000)["position"] == 1000
        for size in (1001, 50_000, 500_000):
            status, why = client.refusal("POST", text + "/read", b"x" * size)
            assert status == 413 and "1,000 bytes; send a text in parts" in why
        chunks = (b"x" * 700 for _ in range(3))  # sent without a length
        status, _, content = client.ask("POST", text + "/read", chunks)
        assert status == 413, content
        assert client.refusal("POST", text + "/write", b" " * 1001)[0] == 413
        assert client.json("POST", text + "/stop")["position"] == 1000


def test_a_body_that_does_not_come_is_given_up(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "BODY_SECONDS", 0.3)
    with served(model) as (_, client):
        text = client.open()
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as line:
            head = f"POST {text}/read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx"
            line.sendall(head.encode())
            assert line.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("wish", "status", "why"),
    [
        (b"", 400, "cannot read the request"),
        (b"[1]", 400, "wanted a JSON object with n_token"),
        (b"[" * 5000, 400, "cannot read the request"),
        (b"\xff", 400, "cannot read the request"),
        ({}, 400, "wanted a JSON object with n_token"),
        ({"n_token": 0}, 413, "n_token=0, but it must be 1 to 100"),
        ({"n_token": 101}, 413, "n_token=101, but it must be 1 to 100"),
        ({"n_token": "9"}, 400, "n_token='9' is unknown or of another type"),
        ({"n_token": True}, 400, "n_token=True is unknown or of another type"),
        ({"n_token": 9, "temperature": -1}, 400, "temperature=-1, but it must be 0 to 100"),
        (b'{"n_token": 9, "temperature": NaN}', 400, "temperature=nan"),
        ({"n_token": 9, "top_p": 0}, 400, "top_p=0, but it must be in (0, 1]"),
        (b'{"n_token": 9, "top_p": NaN}', 400, "top_p=nan"),
        ({"n_token": 9, "seed": 2**63}, 400, "63-bit"),
        ({"n_token": 9, "__class__": 1}, 400, "__class__=1 is unknown"),
    ],
)
def test_a_wish_that_is_not_granted(model: LM, wish: Any, status: int, why: str) -> None:
    with served(model, Limits(new_tokens=100)) as (playground, client):
        got = client.refusal("POST", client.open() + "/write", wish)
        assert got[0] == status and why in got[1]
        assert playground.pool.working == 0


def test_texts_are_bounded(model: LM) -> None:
    with served(model, Limits(position=100)) as (_, client):
        text = client.open()
        assert client.refusal("POST", text + "/read", b"x" * 101)[0] == 413
        client.json("POST", text + "/read", b"x" * 60)
        status, why = client.refusal("POST", text + "/write", {"n_token": 41})
        assert status == 413 and "a text may have 100 tokens here, this one has 60" in why
        assert client.write(text, n_token=40)[-1]["position"] == 100


def test_one_text_is_worked_on_once_and_can_be_stopped(model: LM) -> None:
    with served(model) as (playground, client):
        text = client.open()
        events: list[dict[str, Any]] = []
        thread = threading.Thread(
            target=lambda: events.extend(client.write(text, n_token=10_000, **GREEDY))
        )
        thread.start()
        while playground.pool.working == 0:
            time.sleep(0.01)
        assert client.refusal("POST", text + "/write", {"n_token": 1})[0] == 409
        assert client.refusal("POST", text + "/read", b"x")[0] == 409
        client.json("POST", text + "/stop")
        thread.join(30)
        assert events[-1]["done"] == "stopped"
        assert 0 < events[-1]["written"] == events[-1]["position"] < 10_000
        assert client.write(text, n_token=5)[-1]["position"] == events[-1]["position"] + 5


def test_too_many_at_work_are_told_to_wait(model: LM) -> None:
    with served(model, Limits(streams=1)) as (playground, client):
        first, second = client.open(), client.open()
        thread = threading.Thread(target=client.write, args=(first,), kwargs={"n_token": 10_000})
        thread.start()
        while playground.pool.working == 0:
            time.sleep(0.01)
        status, why = client.refusal("POST", second + "/write", {"n_token": 1})
        assert status == 503 and "try again" in why
        client.json("POST", first + "/stop")
        thread.join(30)
        assert client.write(second, n_token=1)[-1]["done"] == "length"


def test_a_user_who_leaves_frees_the_text(model: LM) -> None:
    with served(model) as (playground, client):
        text = client.open()
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        connection.request("POST", text + "/write", json.dumps({"n_token": 10_000}))
        assert connection.getresponse().read(6) == b"data: "
        connection.close()
        wait_until_idle(playground)
        assert client.write(text, n_token=5)[-1]["done"] == "length"


def test_many_at_once_get_each_their_own_text(model: LM) -> None:
    """No stream is lost, mixed with another or changed by it."""
    prompts = [bytes([65 + i]) * (5 + i) for i in range(8)]

    def told(client: Client, prompt: bytes) -> str:
        text = client.open()
        client.json("POST", text + "/read", prompt)
        events = client.write(text, n_token=60, **GREEDY)
        assert events[-1]["position"] == len(prompt) + 60
        return texts(events)

    with served(model) as (playground, client):
        alone = [told(client, prompt) for prompt in prompts]
        together: list[str | None] = [None] * len(prompts)

        def ask(i: int) -> None:
            together[i] = told(client, prompts[i])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        assert together == alone and len(set(alone)) > 4
        wait_until_idle(playground)


def run_folder(folder: Path, model: LM) -> Path:
    folder.mkdir()
    checkpoint.save_model(model, folder, checkpoint.Medium())
    return folder


def test_the_command_serves_until_it_is_interrupted(
    tmp_path: Path, model: LM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served_at: list[int] = []

    def run(self: Any, listeners: list[socket.socket]) -> None:
        served_at.append(listeners[0].getsockname()[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(play.uvicorn.Server, "run", run)
    folder = run_folder(tmp_path / "run", model)
    assert main(["play", str(folder), "--port", "0", "--json"]) == 0
    said = capsys.readouterr().out.splitlines()
    url = f"http://127.0.0.1:{served_at[0]}/"
    assert said[0] == f"Playground of {folder}: {url}"
    assert json.loads(said[-1]) == {"run": str(folder), "url": url}
    assert main(["play", str(folder), "--port", "0", "--host", "0.0.0.0"]) == 0
    assert f"http://0.0.0.0:{served_at[1]}/#token=" in capsys.readouterr().out


def test_mistakes_are_answered_in_one_line(
    tmp_path: Path, model: LM, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run_folder(tmp_path / "run", model))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, why in (
            ([folder, "--port", port], "give another --port, 0 takes a free one"),
            ([folder, "--port", "99999"], "port 99999, but it must be 0 (a free one) to 65535"),
            ([folder, "--host", "x" * 64 + ".example"], "127.0.0.1 is this machine"),
            ([folder, "--max-streams", "0"], "--max-streams 0, but it must be 1 or more"),
            ([str(tmp_path / "none")], "is not a folder; give a run folder"),
        ):
            assert main(["play", *words]) == 2
            said = capsys.readouterr().err
            assert said.startswith("vqlm play: error: ") and said.count("\n") == 1 and why in said
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    checkpoint.save_model(model, pictures, checkpoint.Medium("image", (2, 2, 3)))
    assert main(["play", str(pictures)]) == 2
    assert "makes pictures; see vqlm sample" in capsys.readouterr().err


def test_softmax_texts_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from tiny import MODEL

    model = LM(dataclasses.replace(MODEL, mixers=("softmax",)))
    folder = run_folder(tmp_path / "run", model)
    seen: list[Limits] = []
    monkeypatch.setattr(play, "serve", lambda made, *_: seen.append(made.pool.limits))
    assert main(["play", str(folder)]) == 0
    assert main(["play", str(folder), "--max-position", "77"]) == 0
    assert [limits.position for limits in seen] == [play.GROWING_POSITION, 77]
    assert torch.is_grad_enabled()


def test_the_address_is_told_when_it_can_be_asked(
    model: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes at once waits for an answer, and is not turned away."""
    came: list[socket.socket] = []

    def announce(url: str) -> None:
        port = int(url.split(":")[2].split("/")[0])
        came.append(socket.create_connection(("127.0.0.1", port), timeout=5))

    monkeypatch.setattr(play.uvicorn.Server, "run", lambda self, sockets: None)
    play.serve(play.Playground(model), "127.0.0.1", 0, announce)
    came[0].close()
