"""From dyes to a picture: stain, light, lens and sensor of one site."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import BaseModel, Field, ValidationError

from smearline.errors import SiteError
from smearline.simulator import canvas
from smearline.sites import Site

Channel = Annotated[float, Field(ge=100, le=255)]


class Dye(BaseModel, frozen=True, extra="forbid"):
    absorbs: tuple[float, float, float]  # optical density in red, green and blue of a unit amount
    strength: float = Field(gt=0, lt=4)
    """How strongly this laboratory stains; 1 is the amount that the cells are drawn with."""


class Simulation(BaseModel, frozen=True, extra="forbid"):
    """The `simulation:` section of a site file."""

    prefix: str = Field(pattern=r"^[A-Z]{1,3}$")  # first letters of every patient id of the site
    utc_offset_hours: int = Field(ge=-12, le=14)
    image_px: int = Field(ge=64, le=canvas.MARGIN_PX)
    white_point: tuple[Channel, Channel, Channel]  # RGB of bare glass
    eosin: Dye
    azure: Dye
    complex: Dye  # the purple that eosin and azure make together in nuclei
    day_to_day: float = Field(ge=0, lt=0.5)
    """Standard deviation of the log of each dye's strength between smears; the white point moves an eighth of it."""
    vignetting: float = Field(ge=0, lt=0.5)  # share of the light lost in the corners
    blur_um: float = Field(gt=0, lt=2)  # standard deviation of the point spread
    gamma: float = Field(gt=0.4, lt=2.5)  # exponent of the camera's tone curve; 1 is linear in the white point's units
    noise: float = Field(ge=0, lt=30)  # standard deviation of the sensor's noise, in grey values
    jpeg_quality: int = Field(ge=40, le=98)


def simulation_of(site: Site) -> Simulation:
    """The site's simulation parameters, checked.

    Raises:
        SiteError: the site is a real one, or a parameter is missing, unknown or out of range.
    """
    if site.simulation is None or site.microns_per_px is None:
        raise SiteError(
            f"site '{site.name}' cannot be drawn: it needs origin: simulated, a 'simulation' section and microns_per_px"
        )
    try:
        return Simulation.model_validate(site.simulation)
    except ValidationError as error:
        raise SiteError(f"site '{site.name}', section 'simulation': {error}") from error


@dataclass(frozen=True)
class Look:
    """One smear's stain and light: the site's, moved by the day."""

    filters_LC: canvas.Field
    """Optical density per channel of a unit of each layer [5, 3]: the three dyes, the lamp and the bare glass."""
    light_2HW: canvas.Field
    """The layers that the light brings along: log of the illumination (0 in the middle), and ones for the glass."""
    blur_px: float
    noise: float


def look_of(simulation: Simulation, microns_per_px: float, rng: np.random.Generator) -> Look:
    """The look of one smear."""
    dyes = (simulation.eosin, simulation.azure, simulation.complex)
    strengths = [d.strength * rng.lognormal(0, simulation.day_to_day) * simulation.gamma for d in dyes]
    white = np.minimum(simulation.white_point * rng.lognormal(0, simulation.day_to_day / 8, 3), 255.0)
    filters = [np.array(d.absorbs) * s for d, s in zip(dyes, strengths, strict=True)]
    axis = np.square(np.linspace(-1, 1, simulation.image_px))
    light = 1.0 - simulation.vignetting * (axis[:, None] + axis[None, :]) / 2
    return Look(
        filters_LC=-np.array([*filters, [-1.0] * 3, -np.log(white)], np.float32),
        light_2HW=np.stack([np.log(light), np.ones_like(light)]).astype(np.float32),
        blur_px=simulation.blur_um / microns_per_px * rng.lognormal(0, 0.1),
        noise=simulation.noise,
    )


def develop(slide: canvas.Canvas, look: Look, defocus: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture [H, W, 3], uint8: Beer-Lambert, tone curve, point spread (times `defocus`), sensor noise."""
    shape = slide.dye_DHW.shape[1:]
    layers = np.concatenate([slide.dye_DHW, look.light_2HW]).reshape(5, -1)
    light_HWC = np.exp(layers.T @ look.filters_LC).reshape(*shape, 3)
    blurred = Image.fromarray(light_HWC.astype(np.uint8)).filter(ImageFilter.GaussianBlur(look.blur_px * defocus))
    noise_HW = look.noise * canvas.cut(canvas.tiles(slide.microns_per_px)["sensor"], shape, rng)
    return np.clip(np.asarray(blurred, np.float32) + noise_HW[..., None], 0, 255).astype(np.uint8)
