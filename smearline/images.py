"""Images of single cells: checked, freed of metadata, decoded, and cropped by physical size.

Arrays are H x W x 3, uint8, RGB.
"""

import io
import re
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from smearline.errors import ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
MIN_SIDE_PX = 24
MAX_PIXELS = 64_000_000
THUMBNAIL_PX = 16

UInt8Array = NDArray[np.uint8]


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Decode strictly, for import. The header is looked at before the pixels, so that a small file cannot ask for a huge picture.

    Raises:
        ImageError: reason 'empty', 'unreadable', 'truncated', 'too_small', 'too_large' or
            'several_pictures'.
    """
    if not data:
        raise ImageError("empty", "0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            # A TIFF's decoder makes room for a whole tile, however small the picture.
            tags = getattr(image, "tag_v2", {})
            for width, height in (image.size, (int(tags.get(TILEWIDTH, 0)), int(tags.get(TILELENGTH, 0)))):
                if width * height > max_pixels:
                    raise ImageError("too_large", f"{width}x{height} px; at most {max_pixels} pixels")
            if getattr(image, "n_frames", 1) > 1:
                raise ImageError("several_pictures", f"{getattr(image, 'n_frames', 1)} pictures in one file")
            image.load()
            pixels = _opaque_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError("unreadable", "no image format that is known") from error
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", f"at most {max_pixels} pixels: {error}") from error
    except Exception as error:  # Pillow's plugins raise errors of many kinds at what they cannot read
        reason = "truncated" if "truncat" in str(error) or "incomplete" in str(error) else "unreadable"
        raise ImageError(reason, str(error)[:200]) from error
    if min(pixels.shape[:2]) < MIN_SIDE_PX:
        raise ImageError("too_small", f"{pixels.shape[1]}x{pixels.shape[0]} px; at least {MIN_SIDE_PX} px a side")
    return pixels


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Decode an image that `check` has passed, or one sent by a client.

    Raises:
        ImageError: as `check`.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if min(height, width) >= MIN_SIDE_PX and height * width <= max_pixels:
                return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        except ValueError:
            pass  # CMYK and other rarities: Pillow reads them, or says what is wrong
    return check(data, max_pixels)


def _opaque_rgb(image: Image.Image) -> UInt8Array:
    """RGB of the opaque part: exports of some scanners carry a transparent border."""
    if image.mode in ("RGBA", "LA", "PA"):
        rgba = np.asarray(image.convert("RGBA"))
        opaque = rgba[..., 3] == 255
        if not opaque.any():
            raise ImageError("unreadable", "the alpha channel leaves no opaque pixel")
        rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
        return np.ascontiguousarray(rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, :3])
    if image.mode.startswith(("I", "F")):
        raise ImageError("unreadable", f"pixel mode {image.mode} (more than 8 bits a channel) is not a stained smear's")
    return np.asarray(image.convert("RGB"))


def thumbnail(image: UInt8Array) -> UInt8Array:
    """16 x 16 luminance means of the whole picture (uint8), from which near duplicates are found."""
    small = Image.fromarray(image).convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small)


def background(image: UInt8Array) -> UInt8Array:
    """RGB of the empty glass (3, uint8): the median of the pixels among the brightest tenth by their darkest channel."""
    pixels = image[::4, ::4].reshape(-1, 3)
    darkest = pixels.min(axis=1)
    return np.median(pixels[darkest >= np.quantile(darkest, 0.9)], axis=0).astype(np.uint8)


def crop(image: UInt8Array, microns_per_px: float, field_um: float, out_px: int) -> UInt8Array:
    """The central square of `field_um` micrometres, resized to out_px x out_px (uint8).

    Where the picture is smaller than the field it is surrounded with its own background colour.
    """
    height, width = image.shape[:2]
    side = field_um / microns_per_px
    missing = int(np.ceil(max(0.0, side - min(height, width)) / 2))
    if missing:
        canvas = np.empty((height + 2 * missing, width + 2 * missing, 3), np.uint8)
        canvas[:] = background(image)
        canvas[missing : missing + height, missing : missing + width] = image
        image, height, width = canvas, canvas.shape[0], canvas.shape[1]
    left, top = (width - side) / 2, (height - side) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + side, width), min(top + side, height))
    resized = Image.fromarray(image).resize((out_px, out_px), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def without_metadata(data: bytes, pixels: UInt8Array) -> bytes:
    """The same picture without EXIF, XMP, IPTC, comments and trailing bytes, any of which may name a patient.

    JPEG and PNG keep their own coding; any other format (TIFF, BMP) becomes a PNG of `pixels`.
    """
    if data[:2] == b"\xff\xd8":
        return b"".join(_jpeg_parts(data))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return b"".join(_png_parts(data))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


_JPEG_KEPT = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
"""Of the segments from `_JPEG_APPLICATION` on, with how they begin: the colour profile, and what tells how colours are coded."""
_JPEG_END, _JPEG_SCAN, _JPEG_APPLICATION = 0xD9, 0xDA, 0xE0
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"IDAT", b"IEND")
"""Pixels and their colours."""


def _jpeg_parts(data: bytes) -> Iterator[bytes]:
    position = 2
    yield data[:2]
    while position + 4 <= len(data):
        if data[position] != 0xFF or data[position + 1] == 0xFF:
            position += 1  # fill bytes
            continue
        marker = data[position + 1]
        if marker == _JPEG_END:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == _JPEG_SCAN:
            found = _ENTROPY_END.search(data, end)
            end = found.start() if found else len(data)
        kept = _JPEG_KEPT.get(marker)
        if marker < _JPEG_APPLICATION or (kept and data.startswith(kept, position + 4)):
            yield data[position:end]
        position = end
    yield b"\xff\xd9"


_ENTROPY_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""The next marker behind coded data, in which 0xFF is followed by 0 or is a restart marker."""


def _png_parts(data: bytes) -> Iterator[bytes]:
    position = 8
    yield data[:8]
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in _PNG_KEPT:
            yield data[position:end]
        if kind == b"IEND":
            return
        position = end


def jpeg_preview(pixels: UInt8Array, height_px: int = 140) -> bytes:
    """A small JPEG of a picture, for a page."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels).resize((round(width * height_px / height), height_px), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
