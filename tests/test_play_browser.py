"""The playground in a real Chromium, as its users meet it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import SCREENS, audit, chromium, overflow, show_as
from playground import Client, served, tiny_model

from vqlm import checkpoint

TOKEN = "a-token-of-this-test"
N_TOKEN = 5_000


def wait(page: Any, ready: Callable[[], Any], seconds: float = 600.0) -> None:
    """Until ``ready`` gives something true; the page's own words say what went wrong."""
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, page.find_element("tag name", "body").text
        time.sleep(0.2)


def text_of(page: Any, name: str) -> str:
    return str(page.find_element("id", name).get_property("textContent"))


def number(page: Any, name: str) -> int:
    return int(text_of(page, name).replace(",", ""))


def click(page: Any, name: str) -> None:
    page.find_element("id", name).click()


def set_value(page: Any, name: str, value: object) -> None:
    field = page.find_element("id", name)
    field.clear()
    field.send_keys(str(value))


@contextmanager
def command(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """``vqlm play`` with a tiny model as a process of its own, and the address that it prints."""
    model = tiny_model()
    folder.mkdir()
    checkpoint.save_model(model, folder, checkpoint.Medium())
    words = [sys.executable, "-m", "vqlm", "play", str(folder), "--port", "0"]
    environment = {**os.environ, "VQLM_PLAY_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words, cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert f"#token={TOKEN}" in line
            yield line.split()[-1].partition("#")[0], psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
        assert code == 0, "Ctrl-C is how it ends"


@pytest.mark.timeout(1800)
def test_a_visit(tmp_path: Path) -> None:
    """Load, stream 5,000 tokens with a stop on the way, continue, a 1 MB file, a second tab."""
    book = tmp_path / "book.txt"
    book.write_bytes(b"state linear code vector window means query value. " * 20_000)
    n_byte = book.stat().st_size
    assert n_byte > 1_000_000
    with command(tmp_path / "run") as (address, server), chromium() as page:
        page.get(address + "#token=" + TOKEN)
        wait(page, lambda: page.find_element("id", "tool").is_displayed())
        assert page.current_url == address, "the token is to leave the address bar"
        state = text_of(page, "state")

        set_value(page, "n-token", N_TOKEN)
        set_value(page, "prompt", "state linear ")
        click(page, "write")
        wait(page, lambda: number(page, "position") > 200)
        memory = server.memory_info().rss
        click(page, "stop")
        wait(page, lambda: "Stopped after" in text_of(page, "status"))
        stopped_at = number(page, "position")
        assert 200 < stopped_at < N_TOKEN
        time.sleep(0.5)
        assert number(page, "position") == stopped_at

        set_value(page, "n-token", N_TOKEN + 13 - stopped_at)
        click(page, "write")
        wait(page, lambda: "tokens written" in text_of(page, "status"))
        assert number(page, "position") == N_TOKEN + 13
        assert len(text_of(page, "output")) > N_TOKEN // 2

        page.find_element("id", "file").send_keys(str(book))
        wait(page, lambda: "tokens read in" in text_of(page, "status"))
        assert number(page, "position") == N_TOKEN + 13 + n_byte
        assert "[book.txt: 1,020,000 tokens read" in text_of(page, "output")

        page.switch_to.new_window("tab")
        page.get(address + "#token=" + TOKEN)
        wait(page, lambda: page.find_element("id", "tool").is_displayed())
        assert number(page, "position") == 0, "a tab is a text of its own"
        set_value(page, "n-token", 50)
        click(page, "write")
        wait(page, lambda: "50 tokens written" in text_of(page, "status"))
        assert number(page, "position") == 50

        page.switch_to.window(page.window_handles[0])
        assert number(page, "position") == N_TOKEN + 13 + n_byte
        assert text_of(page, "state") == state, "the state has the size that it had"
        grown = server.memory_info().rss / memory
        print(f"memory of the server grew {grown:.3f} times; state {state}")
        assert grown < 1.1
        assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
        assert page.execute_async_script(REFUSED) == [401, 413]


REFUSED = """
const done = arguments[0], token = sessionStorage.getItem("token");
const ask = (path, token, body) => fetch("api/texts" + path, {
  method: "POST", body, headers: {Authorization: "Bearer " + token},
});
ask("", token, "").then((answer) => answer.json()).then(({text}) => Promise.all([
  ask(`/${text}/read`, "wrong", "x"), ask(`/${text}/read`, token, "x".repeat(300000)),
])).then((answers) => done(answers.map((answer) => answer.status)));
"""
"""Status of a request with a wrong token, and of one that is too large."""


def test_a_wrong_token_is_told_and_the_right_one_opens() -> None:
    with served(token=TOKEN) as (_, client), chromium() as page:
        page.get(f"http://127.0.0.1:{client.port}/#token=wrong")
        wait(page, lambda: page.find_element("id", "token-form").is_displayed())
        assert "not the right one" in text_of(page, "facts")
        assert not page.find_element("id", "tool").is_displayed()
        assert audit(page) == []
        page.find_element("id", "token").send_keys(TOKEN + "\n")
        wait(page, lambda: page.find_element("id", "tool").is_displayed())


def test_by_keyboard_alone_and_for_every_eye() -> None:
    """Tab reaches everything in order, Ctrl+Enter writes; no finding on any screen or theme."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    with served() as (_, client), chromium() as page:
        page.get(f"http://127.0.0.1:{client.port}/")
        wait(page, lambda: page.find_element("id", "tool").is_displayed())
        reached = []
        for _ in range(9):
            ActionChains(page).send_keys(Keys.TAB).perform()
            reached.append(page.switch_to.active_element.get_attribute("id"))
        assert reached == [
            "output", "prompt", "write", "anew", "file", "n-token", "temperature", "top-p",
            "may-end",
        ]  # fmt: skip
        set_value(page, "n-token", 40)
        page.find_element("id", "prompt").send_keys("linear ", Keys.CONTROL + Keys.ENTER)
        wait(page, lambda: "40 tokens written" in text_of(page, "status"))
        wait(page, lambda: "At 47 tokens" in text_of(page, "speed-words"))
        for screen in SCREENS:
            for theme in ("light", "dark"):
                show_as(page, screen, theme)
                assert audit(page) == []
                assert overflow(page) == 0
        # The audit sees what is wrong when something is.
        page.execute_script("document.querySelector('label[for=prompt]').remove()")
        assert any("label" in finding for finding in audit(page))


def test_a_forgotten_text_is_told_and_the_next_one_works() -> None:
    with served() as (playground, client), chromium() as page:
        page.get(f"http://127.0.0.1:{client.port}/")
        wait(page, lambda: page.find_element("id", "tool").is_displayed())
        set_value(page, "n-token", 20)
        click(page, "write")
        wait(page, lambda: "20 tokens written" in text_of(page, "status"))
        for name in list(playground.pool._sessions):
            Client(client.port).ask("DELETE", f"/api/texts/{name}")
        click(page, "write")
        wait(page, lambda: "no longer remembered" in text_of(page, "status"))
        click(page, "write")
        wait(page, lambda: "20 tokens written" in text_of(page, "status"))
        assert number(page, "position") == 20
