"""Pictures are cropped, scaled and laid out as they should be; what is no picture is named."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqlm.pictures import load_picture, save_png, to_grid


def picture(h: int, w: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def test_the_middle_square_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    wide, tall = picture(5, 9), picture(9, 5)
    save_png(wide, path)
    assert np.array_equal(load_picture(path, 5), wide[:, 2:7])
    save_png(tall, path)
    assert np.array_equal(load_picture(path, 5), tall[2:7])
    assert list(tmp_path.iterdir()) == [path]


def test_scaling_keeps_colours_apart(tmp_path: Path) -> None:
    colours = np.zeros((40, 40, 3), np.uint8)
    colours[:20, :, 0], colours[20:, :, 2] = 200, 100
    save_png(colours, tmp_path / "a.png")
    small = load_picture(tmp_path / "a.png", 4)
    assert small.shape == (4, 4, 3)
    assert small[0, 0].tolist() == [200, 0, 0] and small[3, 3].tolist() == [0, 0, 100]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image = Image.new("RGB", (6, 6), (255, 255, 255)).convert(mode)
    image.save(path, **({"transparency": bytes([0, 1])} if mode == "P" else {}))
    assert load_picture(path, 6).tolist() == [[[255] * 3] * 6] * 6


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = picture(4, 4)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_picture(tmp_path / "a.png", 4), pixels[::-1, ::-1])


def huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow warns at the first, fails at the second
def test_a_decompression_bomb_is_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(huge_png(side, side))
    with pytest.raises(ValueError, match="bomb.png.*decompression bomb.*scale it down"):
        load_picture(tmp_path / "bomb.png", 8)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    save_png(picture(50, 50), tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "rare.ico")  # Pillow would read it
    bad = {"empty.png": b"", "text.jpg": b"hello", "cut.png": good[: len(good) // 2]}
    bad |= {"broken.png": good[:60] + b"\0" * 40 + good[100:], "head.png": good[:20]}
    bad |= {"script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for name in (*bad, "deep.png", "rare.ico"):
        with pytest.raises(ValueError, match=f"{name} is not a picture that can be read"):
            load_picture(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError):
        load_picture(tmp_path / "none.png", 8)
    with pytest.raises(ValueError, match="got size=0"):
        load_picture(tmp_path / "good.png", 0)


def test_a_grid_reads_like_text() -> None:
    images = np.stack([picture(2, 3, seed) for seed in range(5)])
    grid = to_grid(images, 2)
    assert grid.shape == (6, 6, 3)
    for i, image in enumerate(images):
        row, column = divmod(i, 2)
        assert np.array_equal(grid[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], image)
    assert not grid[4:, 3:].any()
    for n, columns in ((0, 2), (5, 0)):
        with pytest.raises(ValueError, match="wanted at least 1 each"):
            to_grid(images[:n], columns)


def test_a_picture_that_cannot_be_saved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png(picture(3, 3), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, path: Path, **kwargs: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_png(picture(3, 3, 1), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
