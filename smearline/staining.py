"""What staining and optics look like on one crop, measured on what every smear shares: glass, red cells, the nucleus.

All of it is measured on the network's own crop, so that the figure is the same in service, in the log and in the
reference. Optical densities follow Beer-Lambert: OD = -log10(I / I0) of each channel, with the crop's own glass as I0;
so a brighter lamp moves the glass and leaves the stain alone. One crop is a noisy witness (a crop full of cells shows
no glass); a smear is judged on the median of its crops.

    stain_glass_R, _G, _B       white point: the glass between the cells, 0 to 255
    stain_red_cell_R, _G, _B    OD of the red cells: eosin and haemoglobin, on every smear, whatever the disease; NaN where
                                less than 8 um2 of them is in sight
    stain_nucleus_R, _G, _B     OD of the dark centre: azure on DNA; NaN where nothing dark lies there. It differs by type
                                of cell: compare it on one type
    optics_sharpness            1/um: steepest edges (98th percentile of the gradient) over the contrast they span (5th to 99th
                                percentile), so that a paler stain is not a worse focus
    optics_noise                grey levels: Immerkaer's filter (1996, doi 10.1006/cviu.1996.0060) on the glass alone
    optics_vignetting           OD by which the glass darkens from the centre to the corner of the crop (least squares on r2)

Blocks of JPEG are not measured: the crop is resized from the scanner's grid, which hides their period.
"""

import numpy as np
from numpy.typing import NDArray

from smearline.errors import ImageError

STAINING = tuple(f"stain_{part}_{channel}" for part in ("glass", "red_cell", "nucleus") for channel in "RGB")
OPTICS = ("optics_sharpness", "optics_noise", "optics_vignetting")
FEATURES: tuple[str, ...] = STAINING + OPTICS

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
_CENTRE_UM, _RIM_UM = 6.0, 9.0
"""Nuclei are sought within the one distance of the centre, red cells beyond the other."""
_LEAST_UM2 = 8.0
"""Less area than this of glass, red cells or nucleus is not measured; a red cell covers about 40."""
_COARSE_PX = 64
"""Colours are measured on every n-th pixel, so that the crop has about as many a side."""
_LEAST_CONTRAST = 12
"""Grey levels of green between glass and red cells, less than which has no edge to be sharp."""


def measure(crops_BHWC: NDArray[np.uint8], microns_per_px: float) -> dict[str, Floats]:
    """FEATURES of each crop: float32 arrays of B; NaN where a crop does not show what is measured.

    Args:
        crops_BHWC: B x S x S x 3, RGB, the cell in the middle.
        microns_per_px: of the crop as given (field_um / size_px).

    Raises:
        ImageError: reason 'unreadable', when the array is no batch of square RGB pictures.
    """
    if crops_BHWC.ndim != 4 or crops_BHWC.shape[1] != crops_BHWC.shape[2] or crops_BHWC.shape[3] != 3:
        raise ImageError("unreadable", f"crops of shape {crops_BHWC.shape}; B x S x S x 3 is measured")
    step = max(1, crops_BHWC.shape[1] // _COARSE_PX)
    coarse, um = np.ascontiguousarray(crops_BHWC[:, ::step, ::step]), step * microns_per_px
    real = ~_padding(coarse)
    white, glass = _glass(coarse, real)
    density = -np.log10((coarse + np.float32(1)) / (white[:, None, None] + np.float32(1)))
    radius = _radius(coarse.shape[1]) * um
    least = _LEAST_UM2 / um**2
    red_cell = _mean(density, _red_cells(density, real, radius), least)
    nucleus = _mean(density, _nucleus(density, real, radius), least)
    values = np.concatenate([white, red_cell, nucleus], axis=1)
    found = {name: values[:, i].astype(np.float32) for i, name in enumerate(STAINING)}
    green = crops_BHWC[..., 1].astype(np.float32)
    found["optics_sharpness"] = _sharpness(green, microns_per_px)
    found["optics_noise"] = _noise(green, glass, step)
    found["optics_vignetting"] = _vignetting(density, glass, radius, least)
    return found


def _padding(pixels: NDArray[np.uint8]) -> Mask:
    """Rows and columns of one colour that surround pictures smaller than the field (`images.crop`)."""
    same = (pixels == pixels[:, :1, :1]).all(axis=-1)
    return same.all(axis=2)[:, :, None] | same.all(axis=1)[:, None, :]


def _glass(pixels: NDArray[np.uint8], real: Mask) -> tuple[Floats, Mask]:
    """(B x 3 white point, mask of the glass): the pixels near the 95th percentile of the darkest channel."""
    darkest = np.where(real, pixels.min(axis=-1), 0).astype(np.float32)
    top = _quantile(darkest, real, 0.95)
    glass = real & (np.abs(darkest - top[:, None, None]) <= 0.04 * top[:, None, None])
    return _mean(pixels.astype(np.float32), glass, 1), glass


def _red_cells(density: Floats, real: Mask, radius: Floats) -> Mask:
    """Away from the centre, denser than glass, and absorbing blue as haemoglobin does and blue cytoplasm and nuclei do not."""
    red, green, blue = np.moveaxis(density, -1, 0)
    coloured = (green > 0.07) & (green < 0.6) & (red < 0.9 * green) & (blue > 0.36 * green)
    return coloured & (radius > _RIM_UM) & real


def _nucleus(density: Floats, real: Mask, radius: Floats) -> Mask:
    """The darker half, in red light (which haemoglobin lets through), of what lies in the centre."""
    red = density[..., 0]
    centre = real & (radius < _CENTRE_UM)
    dark = _quantile(red, centre, 0.95)
    return centre & (red > 0.6 * dark[:, None, None]) & (dark > 0.15)[:, None, None]


def _sharpness(green: Floats, microns_per_px: float) -> Floats:
    """On the rim alone, where red cells lie: chromatin would make it a matter of the cell's type."""
    rim = _radius(green.shape[1])[1:-1, 1:-1] * microns_per_px > _RIM_UM
    if not rim.any():  # a field so narrow that the cell fills it
        return np.full(len(green), np.nan, np.float32)
    down = np.abs(green[:, 2:, 1:-1] - green[:, :-2, 1:-1])[:, rim]
    across = np.abs(green[:, 1:-1, 2:] - green[:, 1:-1, :-2])[:, rim]
    low, high = np.percentile(green[:, 1:-1, 1:-1][:, rim][:, ::3], (5, 95), axis=1)
    steep = np.percentile(np.maximum(down, across), 98, axis=1) / (2 * microns_per_px)
    contrast = high - low
    return np.where(contrast >= _LEAST_CONTRAST, steep / np.maximum(contrast, 1), np.nan).astype(np.float32)


def _noise(green: Floats, glass: Mask, step: int) -> Floats:
    """Inside the glass only: at its rim lie the slopes of cells, and more of them beside a large cell."""
    second = green[:, :, :-2] - 2 * green[:, :, 1:-1] + green[:, :, 2:]
    response = np.abs(second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:])
    inside = response[:, step - 1 :: step, step - 1 :: step]  # its first pixel answers for (1, 1) of the crop
    within = glass[:, 1:-1, 1:-1] & glass[:, :-2, 1:-1] & glass[:, 2:, 1:-1] & glass[:, 1:-1, :-2] & glass[:, 1:-1, 2:]
    inside, seen = inside[:, : within.shape[1], : within.shape[2]], within[:, : inside.shape[1], : inside.shape[2]]
    return (np.sqrt(np.pi / 2) / 6 * _mean(inside[..., None], seen, 32)[:, 0]).astype(np.float32)


def _vignetting(density: Floats, glass: Mask, radius: Floats, least: float) -> Floats:
    weight = glass.astype(np.float32)
    total = np.maximum(weight.sum(axis=(1, 2)), 1)
    x = (radius / radius.max()) ** 2
    y = density.mean(axis=-1)
    mean_x, mean_y = ((weight * v).sum(axis=(1, 2)) / total for v in (x, y))
    dx = (x - mean_x[:, None, None]) * weight
    spread = (dx * dx).sum(axis=(1, 2))
    slope = (dx * (y - mean_y[:, None, None])).sum(axis=(1, 2)) / np.maximum(spread, 1e-6)
    return np.where((total >= least) & (spread > 1), slope, np.nan).astype(np.float32)


def _radius(side: int) -> Floats:
    offset = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
    return np.hypot(offset[:, None], offset[None, :])


def _mean(values: Floats, mask: Mask, least: float) -> Floats:
    """Mean of B x H x W x C over a B x H x W mask; NaN where fewer than `least` pixels are in it."""
    count = mask.sum(axis=(1, 2))
    total = np.einsum("bhwc,bhw->bc", values, mask.astype(np.float32))
    return np.where(count[:, None] >= least, total / np.maximum(count, 1)[:, None], np.nan).astype(np.float32)


def _quantile(values: Floats, mask: Mask, level: float) -> Floats:
    """A quantile of each crop's values (B x H x W) over its mask; 0 where it is empty."""
    ordered = np.sort(np.where(mask, values, -np.inf).reshape(len(values), np.prod(values.shape[1:])), axis=1)
    count = mask.sum(axis=(1, 2))
    position = ordered.shape[1] - 1 - ((1 - level) * np.maximum(count - 1, 0)).astype(int)
    return np.where(count > 0, ordered[np.arange(len(values)), position], 0).astype(np.float32)
