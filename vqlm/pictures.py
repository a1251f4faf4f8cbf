"""Pictures in and out, by Pillow: files to square RGB arrays, arrays to one PNG file.

Axes: n pictures, h height, w width, 3 red green blue; uint8.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from PIL import Image

# Plain raster formats; others can start programs (EPS) or are seldom tested.
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


def load_picture(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The middle square of a picture file, scaled to `size` x `size` pixels by averaging, as RGB.

    Turned as its EXIF data says; of an animation the first frame; transparency is dropped.

    Raises ValueError, naming the file, for one that is no picture, is truncated, has more than 8
    bits a channel, or more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb);
    OSError when it cannot be opened; ModuleNotFoundError when Pillow is not installed.
    """
    if size < 1:
        raise ValueError(f"load_picture: got size={size}, wanted at least 1")
    # Opened by itself, so that a file that may not be read is no damaged picture.
    with open(path, "rb") as file, warnings.catch_warnings():
        from PIL import Image, ImageOps

        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Oddities in a file's metadata; whatever cannot be decoded is an error anyway.
        warnings.simplefilter("ignore", UserWarning)
        try:
            with Image.open(file, formats=_FORMATS) as image:
                rgb = _to_rgb(ImageOps.exif_transpose(image))
                square = ImageOps.fit(rgb, (size, size), Image.Resampling.BOX)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{path}: {error}; scale it down first, or leave it out") from error
        except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
            raise ValueError(
                f"{path} is not a picture that can be read ({error}); repair it or leave it out"
            ) from error
    return np.array(square)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}; wanted at most 8 bits a channel")
    # By way of RGBA: a palette's transparency would be a warning otherwise.
    return (
        image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert("RGB")
    )


def to_grid(images: UInt8[np.ndarray, "n h w 3"], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Pictures side by side, row after row; what is left of the last row is black.

    H = h * number of rows, W = w * columns.  Raises ValueError for no pictures or columns < 1.
    """
    n, h, w, _ = images.shape
    if n < 1 or columns < 1:
        raise ValueError(f"to_grid: got {n} pictures in {columns} columns, wanted at least 1 each")
    rows = -(-n // columns)
    grid = np.zeros((rows * columns, h, w, 3), np.uint8)
    grid[:n] = images
    return (
        grid.reshape(rows, columns, h, w, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * h, columns * w, 3)
    )


def save_png(picture: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    """Writes a PNG file, in one step: `path` is the old file or the whole new one.

    Raises OSError when it cannot be written; ModuleNotFoundError when Pillow is not installed.
    """
    from PIL import Image

    partial = path.with_name(f".{path.name}.partial")
    try:
        Image.fromarray(picture).save(partial, format="PNG")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
