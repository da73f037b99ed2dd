"""How each type looks; the numbers are in styles.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict

from smearline.simulator.canvas import Dyes


class Style(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    diameter_um: tuple[float, float]
    """Mean and standard deviation."""
    nucleus: tuple[float, float] = (0.0, 0.0)
    """Radius of a disc of the nucleus' area as a share of the cell's radius: mean and standard deviation."""
    cytoplasm: Dyes = (0.0, 0.0, 0.0)
    chromatin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Amount of the purple complex, contrast, and share of coarse clumps in the texture."""
    granules: tuple[str, Dyes] | None = None
    """Tile of textures.py and dyes, where no characteristic says otherwise."""
    shapes: tuple[str, ...] = ("unsegmented-round",)
    """Shapes of the nucleus, drawn evenly, where no characteristic names one."""
    eccentric: float = 0.25
    """How far the nucleus lies off the middle, as a share of the room there is."""
    rim: float = 0.0
    """Further azure along the cell's edge."""
    warp_um: float = 0.3
    """How far the outline wanders."""


class Styles(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    types: dict[str, Style]
    red_cell: Dyes
    red_cell_diameter_um: tuple[float, float]
    cytoplasm_colours: dict[str, Dyes]
    granule_colours: dict[str, Dyes]
    granule_tiles: dict[str, str]


@cache
def styles() -> Styles:
    """styles.yaml, read once."""
    return Styles.model_validate(yaml.safe_load(files(__package__).joinpath("styles.yaml").read_text(encoding="utf-8")))
