"""Pictures are cropped by physical size, and the same cell looks the same whatever the scanner's resolution."""

import io
import struct
import zlib

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from smearline import images
from smearline.errors import ImageError


def disc(diameter_um: float, microns_per_px: float, side_px: int) -> images.UInt8Array:
    y, x = (np.mgrid[:side_px, :side_px] + 0.5 - side_px / 2) * microns_per_px
    pixels = np.full((side_px, side_px, 3), (250, 240, 230), np.uint8)
    pixels[x**2 + y**2 < (diameter_um / 2) ** 2] = (90, 40, 120)
    return pixels


@pytest.mark.parametrize(("microns_per_px", "side_px"), [(0.1, 360), (0.0725, 400), (0.2, 160), (0.15, 363)])
def test_a_cell_has_its_physical_size_whatever_the_resolution(microns_per_px: float, side_px: int):
    crop = images.crop(disc(12.0, microns_per_px, side_px), microns_per_px, field_um=25.0, out_px=100)
    area_um2 = (crop[..., 1] < 140).sum() * (25.0 / 100) ** 2
    assert area_um2 == pytest.approx(np.pi * 36, rel=0.04)


def test_a_picture_smaller_than_the_field_is_surrounded_with_its_background():
    crop = images.crop(disc(8.0, 0.1, 120), 0.1, field_um=25.0, out_px=100)
    np.testing.assert_allclose(crop[0, 0], (250, 240, 230), atol=1)
    assert (crop[..., 1] < 140).sum() * 0.25**2 == pytest.approx(np.pi * 16, rel=0.05), "and is not blown up"


def test_the_transparent_border_of_an_export_is_cut_off():
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[10:70, 20:60] = (200, 100, 50, 255)
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "TIFF")
    found = images.check(out.getvalue())
    assert found.shape == (60, 40, 3)
    assert (found == (200, 100, 50)).all()


def sixteen_bit() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64), 40000, np.uint16)).save(out, "TIFF")
    return out.getvalue()


def two_pages() -> bytes:
    out = io.BytesIO()
    page = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    page.save(out, "TIFF", save_all=True, append_images=[page])
    return out.getvalue()


def said_to_be(side_px: int) -> bytes:
    """A BMP whose header says that it is so large."""
    data = picture(1, kind="BMP")
    return data[:18] + struct.pack("<ii", side_px, side_px) + data[26:]


def tiled(side_px: int) -> bytes:
    """A TIFF of 64 x 64 pixels that is stored in one tile, deflated."""
    data = zlib.compress(bytes(3 * side_px**2))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 2, 277: 3, 322: side_px, 323: side_px, 324: 8, 325: len(data)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + fields + bytes(4)


def test_the_tile_of_a_tiff_counts_as_its_picture():
    assert images.check(tiled(64)).shape == (64, 64, 3)
    with pytest.raises(ImageError, match="too_large: 512x512 px; at most 10000 pixels"):
        images.check(tiled(512), 10_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (said_to_be(9000), "too_large"),
        (said_to_be(15_000), "too_large"),
        (b"GIF89a", "unreadable"),
        (picture(1, size=200)[:2000], "truncated"),
        (picture(1, size=200, kind="PNG")[:2000], "truncated"),
        (picture(1, size=10), "too_small"),
        (sixteen_bit(), "unreadable"),
        (two_pages(), "several_pictures"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str):
    with pytest.raises(ImageError) as error:
        images.check(data)
    assert error.value.reason == reason


def test_fast_and_strict_decoding_agree():
    np.testing.assert_array_equal(images.decode(picture(3, size=120)), images.check(picture(3, size=120)))
    for size, reason in ((10, "too_small"), (120, "too_large")):
        for read in (images.decode, images.check):
            with pytest.raises(ImageError, match=reason):
                read(picture(3, size=size), 10_000)


def test_thumbnails_are_256_bytes():
    assert images.thumbnail(images.decode(picture(1))).tobytes().__len__() == 256
