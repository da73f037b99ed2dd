"""Staining and optics are measured on glass, red cells and nucleus, and one is not taken for the other."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from smearline.errors import ImageError
from smearline.staining import FEATURES, measure

UM = 25 / 128
GLASS = np.array([250.0, 230.0, 205.0])
RED, NUCLEUS = np.array([0.09, 0.16, 0.10]), np.array([0.50, 0.80, 0.17])


def crop(
    *,
    stain: float = 1.0,
    lamp: float = 1.0,
    blur: float = 0.6,
    noise: float = 0.0,
    red_cells: bool = True,
    side: int = 128,
) -> np.ndarray:
    """A round cell with its nucleus in the middle, red cells in the corners, and optical densities that are known."""
    y, x = (np.mgrid[:side, :side] - (side - 1) / 2) * 25 / side
    density = np.zeros((side, side, 3))
    density[np.hypot(x, y) < 6.5] = 0.08 * stain
    density[np.hypot(x, y) < 4.5] = NUCLEUS * stain
    if red_cells:
        for cx, cy in ((-10, -10), (10, -10), (-10, 10), (10, 10)):
            density[np.hypot(x - cx, y - cy) < 3.6] = RED * stain
    pixels = Image.fromarray(np.clip(GLASS * lamp * 10**-density, 0, 255).astype(np.uint8))
    soft = np.asarray(pixels.filter(ImageFilter.GaussianBlur(blur * side / 128)), float)
    return np.clip(soft + np.random.default_rng(1).normal(size=soft.shape) * noise, 0, 255).astype(np.uint8)


def measured(*crops: np.ndarray) -> dict[str, np.ndarray]:
    return measure(np.stack(crops), 25 / crops[0].shape[0])


@pytest.mark.parametrize("side", [64, 128])
def test_glass_red_cells_and_nucleus_are_found(side: int):
    found = measured(crop(side=side))
    assert tuple(found) == FEATURES
    assert all(v.dtype == np.float32 and v.shape == (1,) for v in found.values())
    for i, channel in enumerate("RGB"):
        assert found[f"stain_glass_{channel}"][0] == pytest.approx(GLASS[i], abs=2)
        assert found[f"stain_red_cell_{channel}"][0] == pytest.approx(RED[i], rel=0.12)
        assert found[f"stain_nucleus_{channel}"][0] == pytest.approx(NUCLEUS[i], rel=0.08)


def test_a_dimmer_lamp_moves_the_glass_and_not_the_stain():
    found = measured(crop(), crop(lamp=0.85))
    assert found["stain_glass_G"][1] < found["stain_glass_G"][0] - 25
    assert found["stain_red_cell_G"][1] == pytest.approx(found["stain_red_cell_G"][0], rel=0.05)


def test_a_paler_stain_is_not_a_worse_focus_and_a_worse_focus_is_seen():
    plain, pale, blurred = measured(crop(), crop(stain=0.75), crop(blur=2.0))["optics_sharpness"]
    assert pale == pytest.approx(plain, rel=0.07)
    assert blurred < 0.7 * plain


def test_noise_is_measured_on_the_glass():
    quiet, noisy = measured(crop(), crop(noise=4.0))["optics_noise"]
    assert quiet < 0.5
    assert noisy == pytest.approx(4.0, rel=0.25)


def test_what_is_not_in_sight_is_missing_and_not_zero():
    found = measured(crop(red_cells=False))
    assert np.isnan(found["stain_red_cell_G"][0])
    assert found["stain_nucleus_G"][0] == pytest.approx(0.8, rel=0.08)


def test_the_frame_around_a_picture_smaller_than_the_field_is_not_glass():
    small = crop()
    framed = np.empty_like(small)
    framed[:] = (120, 130, 90)
    framed[20:-20, 20:-20] = small[20:-20, 20:-20]
    assert measured(framed)["stain_glass_R"][0] == pytest.approx(250, abs=3)


def test_an_array_that_is_no_batch_of_pictures_is_refused():
    with pytest.raises(ImageError, match="B x S x S x 3"):
        measure(np.zeros((4, 64, 32, 3), np.uint8), UM)
