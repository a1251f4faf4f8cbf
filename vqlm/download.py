"""Official data sets from where they are published; nothing gets its name before it was checked.

A file grows as NAME.partial, from which a broken download goes on, and is renamed when size and
hash are right.  Standard library only.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

_ENWIK8 = "https://mattmahoney.net/dc/enwik8.zip"
_PG19_LIST = "https://storage.googleapis.com/storage/v1/b/deepmind-gutenberg/o"
_PG19_FILES = "https://storage.googleapis.com/deepmind-gutenberg/"

_BLOCK = 1 << 18
_TIMEOUT = 60.0  # seconds without a byte
_ATTEMPTS = 5  # in a row that brought nothing new
_PAUSE = 2.0  # seconds before the second attempt; then twice as long each time
_PG19_NAME = re.compile(r"(train|validation|test)/\d+\.txt|metadata\.csv")
_MAX_LISTING = 1 << 24  # bytes of one page


class Expected(NamedTuple):
    """What a file must be."""

    size: int
    """Bytes."""
    algorithm: str
    """Name of a hash, as hashlib knows it."""
    digest: str
    """The hash, hex in lower case."""


# Size and hash as many independent projects have pinned them.
_ENWIK8_ZIP = Expected(
    36_445_475, "sha256", "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
)
# Published with the data; its md5 there is a1fa5ffddb56f4953e226637dabbb36a.
_ENWIK8_RAW = Expected(
    100_000_000, "sha256", "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
)


def download(name: str, folder: str | Path) -> Path:
    """Downloads a data set, or what is still missing of it; returns what `prepare` takes.

    - "enwik8": the zip of the Hutter prize's page, unpacked; both checked against known hashes.
    - "pg19": all books from DeepMind's bucket, checked against the md5 that the bucket's own
      listing states.  No independent hash is known to us: the listing of the first download is
      kept as listing.json, and later downloads are held to it.
    - "imagenet64": cannot be downloaded without an account; the error says what to do.

    Raises ValueError for an unknown name, wrong contents, or a file in the way; OSError when the
    network or the disk fails.  Call it again to go on.
    """
    target = Path(folder).expanduser()
    if name == "enwik8":
        archive = fetch(_ENWIK8, target / "enwik8.zip", _ENWIK8_ZIP)
        return unzip(archive, "enwik8", target, _ENWIK8_RAW)
    if name == "pg19":
        for book, expected in _pg19_listing(target).items():
            fetch(_PG19_FILES + urllib.parse.quote(book), target / book, expected)
        return target
    if name == "imagenet64":
        raise ValueError(
            "imagenet64 needs an account: register at image-net.org, download 'Downsampled "
            "ImageNet' 64x64 (npz, train parts 1 and 2, validation), and unpack all of "
            f"train_data_batch_1.npz ... and val_data.npz into one folder, such as {target}"
        )
    raise ValueError(f"unknown data set {name!r} (known: enwik8, pg19, imagenet64)")


def fetch(url: str, path: Path, expected: Expected) -> Path:
    """Downloads one file, going on from PATH.partial where there is one; returns `path`.

    A file that is there already and right is left alone.

    Raises ValueError for contents of another size or hash, which are removed, or for another file
    at `path`, which is not; OSError when the server does not answer, after several attempts, or
    when the disk is full.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"fetch: got {url}, wanted an address with http or https")
    if path.exists():
        if _differs(path, expected) is None:
            return path
        raise ValueError(f"{path} is there and is not {url}; move it away to download it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    _require_space(partial, expected.size)
    failures, most = 0, _size(partial)
    while (size := _size(partial)) < expected.size:
        try:
            _append(url, partial, size, expected.size)
        except ValueError:
            partial.unlink()
            raise
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            # Bytes that have come before, and were thrown away, are no progress.
            failures = 1 if _size(partial) > most else failures + 1
            most = max(most, _size(partial))
            if failures == _ATTEMPTS or _is_final(error):
                raise OSError(
                    f"{url} could not be downloaded: {error!r}; {_size(partial)} bytes are kept, "
                    "download again to go on from there"
                ) from error
            time.sleep(_PAUSE * 2 ** (failures - 1))
    return _accept(partial, path, expected, url)


def unzip(archive: Path, member: str, folder: Path, expected: Expected) -> Path:
    """Unpacks one file of a zip archive into `folder`; returns its path.

    Raises ValueError when the archive is damaged, has no such file, has any entry that points
    outside of `folder` or is a link, or when the file is not as expected; then nothing is left.
    """
    path = folder / member
    if path.exists():
        if _differs(path, expected) is None:
            return path
        raise ValueError(f"{path} is there and is not {member} of {archive}; move it away")
    partial = path.with_name(f"{path.name}.partial")
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                _refuse_unsafe(archive, entry)
            size = opened.getinfo(member).file_size
            if size != expected.size:
                raise ValueError(f"{archive}: {member} has {size} bytes, not {expected.size}")
            _require_space(partial, size)
            with opened.open(member) as source, open(partial, "wb") as target:
                # What the entry says of its size is not to be trusted.
                _copy(source.read, target, expected.size)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{archive} is damaged ({error}); remove it, download again") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return _accept(partial, path, expected, f"{member} of {archive}")


def _append(url: str, partial: Path, have: int, wanted: int) -> None:
    """One request for what is missing."""
    headers = {"User-Agent": "vqlm", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise
    with response:
        goes_on = response.status == 206 and re.match(
            rf"bytes {have}-", response.headers.get("Content-Range", "")
        )
        with open(partial, "ab" if goes_on else "wb") as file:
            missing = _copy(response.read, file, wanted - (have if goes_on else 0))
    if missing:  # read in blocks, a connection that breaks looks like the end
        raise http.client.IncompleteRead(b"", missing)


def _copy(read: Callable[[int], bytes], target: io.BufferedWriter, n_bytes: int) -> int:
    """Copies to the end, n_bytes at most; returns how many fewer there were.

    Raises ValueError when there are more.
    """
    while block := read(_BLOCK):
        if len(block) > n_bytes:
            raise ValueError(f"{target.name}: there is more than was expected; nothing was kept")
        target.write(block)
        n_bytes -= len(block)
    return n_bytes


def _is_final(error: Exception) -> bool:
    """Whether asking again would be of no use."""
    return isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)


def _accept(partial: Path, path: Path, expected: Expected, origin: str) -> Path:
    if (difference := _differs(partial, expected)) is not None:
        partial.unlink(missing_ok=True)
        raise ValueError(
            f"{origin} is not what was expected: {difference}; it was removed. Try again; if that "
            "does not help, the published file has changed"
        )
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def _differs(path: Path, expected: Expected) -> str | None:
    """What is wrong with a file, or None."""
    if not path.is_file() or _size(path) != expected.size:
        return f"{_size(path)} bytes, wanted {expected.size}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, expected.algorithm).hexdigest()
    if digest == expected.digest:
        return None
    return f"its {expected.algorithm} is {digest}, wanted {expected.digest}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_space(partial: Path, size: int) -> None:
    missing, free = size - _size(partial), shutil.disk_usage(partial.parent).free
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"{partial.parent} has {free / 1e9:.2f} GB free, wanted {missing / 1e9:.2f} GB",
        )


def _refuse_unsafe(archive: Path, entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename.replace("\\", "/"))
    link = stat.S_ISLNK(entry.external_attr >> 16)
    if name.is_absolute() or ".." in name.parts or ":" in entry.filename or link:
        raise ValueError(f"{archive} has an entry {entry.filename!r} that leads outside; refused")


def _pg19_listing(folder: Path) -> dict[str, Expected]:
    """Every file of the bucket that is part of PG-19, as first seen."""
    path = folder / "listing.json"
    if path.exists():
        try:
            known = {n: Expected(*e) for n, e in json.loads(path.read_bytes()).items()}
            if not all(map(_PG19_NAME.fullmatch, known)):
                raise ValueError("it has other names than PG-19's")
            return known
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to begin anew") from error
    listing: dict[str, Expected] = {}
    token = ""
    while True:
        fields = {"fields": "items(name,size,md5Hash),nextPageToken", "pageToken": token}
        page = _read_json(f"{_PG19_LIST}?{urllib.parse.urlencode(fields)}")
        try:
            for item in page["items"]:
                if _PG19_NAME.fullmatch(item["name"]):  # no other name can become a path
                    md5 = base64.b64decode(item["md5Hash"], validate=True).hex()
                    listing[item["name"]] = Expected(int(item["size"]), "md5", md5)
            token = page.get("nextPageToken", "")
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise ValueError(f"{_PG19_LIST}: not a bucket's listing ({error!r})") from error
        if not token:
            break
    if "metadata.csv" not in listing:
        raise ValueError(f"{_PG19_LIST}: no metadata.csv among {len(listing)} files")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_name("listing.json.partial")
    partial.write_text(json.dumps(listing, indent=0), encoding="utf-8")
    os.replace(partial, path)
    return listing


def _read_json(url: str) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "vqlm"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            return json.loads(response.read(_MAX_LISTING))
    except http.client.HTTPException as error:
        raise OSError(f"{url} broke off: {error!r}; try again") from error
    except ValueError as error:
        raise ValueError(f"{url}: not JSON ({error})") from error
