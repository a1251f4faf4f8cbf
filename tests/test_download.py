"""Against a server of our own: broken connections, other contents, archives that mean harm."""

import base64
import hashlib
import json
import stat
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vqlm import download as module
from vqlm.download import Expected, download, fetch, unzip

CONTENT = bytes(range(256)) * 40


class Server:
    """What to serve, how badly, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.ranges = True
        self.break_after: int | None = None
        self.status: int | None = None
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            wanted = self.headers.get("Range")
            state.asked.append((path, wanted))
            if "pageToken" in query:
                path += urllib.parse.parse_qs(query, keep_blank_values=True)["pageToken"][0]
            content = state.files.get(path)
            if state.status or content is None:
                self.send_error(state.status or 404)
                return
            begin = 0
            if wanted and state.ranges:
                begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                last = len(content) - 1
                self.send_header("Content-Range", f"bytes {begin}-{last}/{len(content)}")
            else:
                self.send_response(200)
            body = content[begin:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(module, "_PAUSE", 0.0)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def expected(content: bytes = CONTENT) -> Expected:
    return Expected(len(content), "sha256", hashlib.sha256(content).hexdigest())


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    assert fetch(server.url + "/file", path, expected()) == path
    assert path.read_bytes() == CONTENT
    fetch(server.url + "/file", path, expected())
    assert server.asked == [("/file", None)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.ranges = ranges
    partial = tmp_path / "file.partial"
    partial.write_bytes(CONTENT[:3000])
    fetch(server.url + "/file", tmp_path / "file", expected())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [("/file", "bytes=3000-")]
    assert not partial.exists()


def test_breaks_are_survived_as_long_as_there_is_progress(server: Server, tmp_path: Path) -> None:
    server.break_after = 1000  # eleven connections, more than the attempts without progress
    fetch(server.url + "/file", tmp_path / "file", expected())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked[3] == ("/file", "bytes=3000-")


def test_without_progress_it_gives_up_and_keeps_what_it_has(server: Server, tmp_path: Path) -> None:
    server.break_after = 1000
    server.ranges = False  # so that every attempt brings the same bytes
    with pytest.raises(OSError, match="could not be downloaded.*1000 bytes are kept"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert [p.name for p in tmp_path.iterdir()] == ["file.partial"]
    assert len(server.asked) == 5


def test_a_file_that_is_too_short_on_the_server_ends_the_attempts(
    server: Server, tmp_path: Path
) -> None:
    server.files["/file"] = CONTENT[:500]
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert len(server.asked) < 10


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT + b"x", b"x" * (1 << 20)])
def test_other_contents_are_refused_and_removed(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    server.files["/file"] = content
    with pytest.raises(ValueError, match="more than was expected|its sha256 is"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_of_something_else_is_not_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="it was removed. Try again"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    fetch(server.url + "/file", tmp_path / "file", expected())
    (tmp_path / "other.partial").write_bytes(b"x" * 100_000)
    with pytest.raises(ValueError, match="100000 bytes, wanted 10240"):
        fetch(server.url + "/file", tmp_path / "other", expected())


@pytest.mark.parametrize(("status", "n_asked"), [(404, 1), (403, 1), (503, 5)])
def test_refusals_of_the_server(server: Server, tmp_path: Path, status: int, n_asked: int) -> None:
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert len(server.asked) == n_asked


def test_what_stands_in_the_way_stays(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert (tmp_path / "file").read_bytes() == b"mine"
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
        with pytest.raises(ValueError, match="wanted an address with http"):
            fetch(url, tmp_path / "other", expected())


def test_no_download_without_room(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10_000})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="0.00 GB free"):
        fetch(server.url + "/file", tmp_path / "file", expected())
    assert server.asked == []
    (tmp_path / "file.partial").write_bytes(CONTENT[:300])  # the rest has room
    fetch(server.url + "/file", tmp_path / "file", expected())


def archive(path: Path, *extra: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("text", CONTENT)
        for entry in extra:
            opened.writestr(entry, b"harm")
    return path


def test_unzip_gives_the_one_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", zipfile.ZipInfo("folder/other"))
    assert unzip(path, "text", tmp_path, expected()).read_bytes() == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "text"]
    path.write_bytes(b"")
    unzip(path, "text", tmp_path, expected())  # there already
    (tmp_path / "text").write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        unzip(path, "text", tmp_path, expected())


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "..\\out", "C:out"])
def test_an_entry_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "a.zip", zipfile.ZipInfo(name))
    with pytest.raises(ValueError, match="leads outside"):
        unzip(path, "text", tmp_path / "in", expected())
    assert not (tmp_path / "out").exists() and not (tmp_path / "in" / "text").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ValueError, match="leads outside"):
        unzip(archive(tmp_path / "a.zip", link), "text", tmp_path, expected())


def test_archives_of_another_kind_leave_nothing(tmp_path: Path) -> None:
    good = archive(tmp_path / "a.zip").read_bytes()
    flipped = bytearray(good)
    flipped[60] ^= 0xFF
    for content in (b"", b"no zip", good[:-40], bytes(flipped)):
        path = tmp_path / "bad.zip"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            unzip(path, "text", tmp_path, expected())
    with pytest.raises(ValueError, match="damaged.*other"):
        unzip(tmp_path / "a.zip", "other", tmp_path, expected())
    with pytest.raises(ValueError, match="10240 bytes, not 10239"):
        unzip(tmp_path / "a.zip", "text", tmp_path, expected(CONTENT[:-1]))
    with pytest.raises(ValueError, match="its sha256 is"):
        unzip(tmp_path / "a.zip", "text", tmp_path, expected(CONTENT[::-1]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "bad.zip"]


def test_an_entry_that_is_longer_than_it_says_stops_there(tmp_path: Path) -> None:
    content = bytearray(archive(tmp_path / "a.zip").read_bytes())
    true, false = len(CONTENT).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert content.count(true) == 2  # the local header and the directory
    (tmp_path / "a.zip").write_bytes(bytes(content).replace(true, false))
    with pytest.raises(ValueError):
        unzip(tmp_path / "a.zip", "text", tmp_path, expected(CONTENT[:100]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_enwik8_is_fetched_and_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as opened:
        opened.writestr("enwik8", CONTENT)
    packed = (tmp_path / "made.zip").read_bytes()
    server.files["/enwik8.zip"] = packed
    monkeypatch.setattr(module, "_ENWIK8", server.url + "/enwik8.zip")
    monkeypatch.setattr(module, "_ENWIK8_ZIP", expected(packed))
    monkeypatch.setattr(module, "_ENWIK8_RAW", expected())
    assert download("enwik8", tmp_path / "out").read_bytes() == CONTENT
    assert module._ENWIK8_RAW.size == len(CONTENT)


def item(name: str, content: bytes) -> dict[str, str]:
    digest = base64.b64encode(hashlib.md5(content).digest()).decode()
    return {"name": name, "size": str(len(content)), "md5Hash": digest}


def test_pg19_is_what_the_listing_says(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = {"metadata.csv": b"1,A\n", "train/1.txt": b"one", "test/22.txt": b"two"}
    server.files |= {f"/files/{name}": text for name, text in books.items()}
    items = [item(name, text) for name, text in books.items()]
    harm = [item("train/../../x.txt", b"x"), item("LICENSE", b"x")]
    server.files["/list"] = json.dumps({"items": items[:2] + harm, "nextPageToken": "2"}).encode()
    server.files["/list2"] = json.dumps({"items": items[2:]}).encode()
    monkeypatch.setattr(module, "_PG19_LIST", server.url + "/list")
    monkeypatch.setattr(module, "_PG19_FILES", server.url + "/files/")
    assert download("pg19", tmp_path / "pg19") == tmp_path / "pg19"
    got = {p.relative_to(tmp_path / "pg19").as_posix(): p for p in tmp_path.rglob("*.*")}
    assert got.keys() - {"listing.json"} == books.keys()
    assert all(got[name].read_bytes() == text for name, text in books.items())
    # Later downloads are held to what was listed first.
    (tmp_path / "pg19" / "test" / "22.txt").unlink()
    server.files["/files/test/22.txt"] = b"new"
    server.files["/list2"] = json.dumps({"items": [item("test/22.txt", b"new")]}).encode()
    with pytest.raises(ValueError, match="md5"):
        download("pg19", tmp_path / "pg19")
    (tmp_path / "pg19" / "listing.json").write_text('{"../x": [1, "md5", ""]}')
    with pytest.raises(ValueError, match="listing.json is damaged"):
        download("pg19", tmp_path / "pg19")


@pytest.mark.parametrize("page", [b"<html>", b"[]", b'{"items": [{"name": "train/1.txt"}]}', b"{}"])
def test_a_page_that_is_no_listing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: bytes
) -> None:
    server.files["/list"] = page
    monkeypatch.setattr(module, "_PG19_LIST", server.url + "/list")
    with pytest.raises(ValueError, match="listing|not JSON"):
        download("pg19", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image-net.org"):
        download("imagenet64", tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'enwik9'"):
        download("enwik9", tmp_path)
