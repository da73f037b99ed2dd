"""Sites: one YAML file a laboratory, saying how its images and counts are made and what may be done with them."""

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from smearline.errors import SiteError, nearest

SITES_VARIABLE = "SMEARLINE_SITES"
ASSUMED_MICRONS_PER_PX = 0.1
"""The fallback that a new site starts with where no scale is given: that of CellaVision exports such as PBC's."""
LEAST, MOST = 0.01, 2.0
"""Micrometres a pixel, beyond which no microscope's picture of a cell lies: pixels a micrometre, perhaps."""


class Site(BaseModel, frozen=True, extra="forbid"):
    """What is known of one laboratory. Lengths in micrometres."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{1,31}$")
    laboratory: str
    scanner: str
    stain: str
    microns_per_px: float | None = Field(gt=LEAST, lt=MOST)
    """None where the owner does not state the scale; then `assumed_microns_per_px` must be given."""
    scale_source: str
    """Who says so: the owner's paper, a calibration slide, an assumption with its reason."""
    assumed_microns_per_px: float | None = Field(default=None, gt=LEAST, lt=MOST)
    """The stated fallback where the scale is unknown; predictions made with it are flagged `scale_assumed`."""
    origin: Literal["real", "simulated"]
    use: Literal["research", "clinical"]
    identifiers: Literal["private", "public"] = "private"
    """'private': patient and smear become HMACs under the laboratory's own key. 'public': the identifiers are
    published pseudonyms already, and a fixed key keeps them the same on every machine."""
    cbc_units: dict[str, str] = Field(default_factory=dict)
    retention_days: int | None = Field(default=None, ge=1)
    simulation: dict[str, Any] | None = None
    """What the simulator needs to draw this site; only for simulated sites."""

    def model_post_init(self, _: Any) -> None:
        if self.microns_per_px is None and self.assumed_microns_per_px is None:
            raise ValueError("microns_per_px is null, so assumed_microns_per_px must be given")
        if (self.simulation is not None) != (self.origin == "simulated"):
            raise ValueError("a simulated site has a 'simulation' section, and a real one has none")


def directory() -> Path:
    """The folder of site files: $SMEARLINE_SITES, `sites/` here or in a parent folder, or the checkout's own.

    Raises:
        SiteError: there is none.
    """
    if named := os.environ.get(SITES_VARIABLE):
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "sites").is_dir() and any((folder / "sites").glob("*.yaml")):
            return folder / "sites"
    raise SiteError(f"no folder of site files: run inside a checkout, or name one in ${SITES_VARIABLE}")


def load(name: str, folder: Path | None = None) -> Site:
    """The site's file, checked.

    Raises:
        SiteError: there is no such file, or it is not a valid one.
    """
    folder = folder or directory()
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise SiteError(
            f"site '{name}' has no file in {folder}; known: {', '.join(known)} (nearest: {nearest(name, known)}). "
            f"Write one with: smearline site new {name}"
        )
    try:
        site = Site.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise SiteError(f"{path}: {error}") from error
    if site.name != name:
        raise SiteError(f"{path} says name: {site.name}; the file's name and the site's must be the same")
    return site


def new(name: str, microns_per_px: float | None = None) -> Path:
    """Write a site file to be completed by hand and return its path.

    Raises:
        SiteError: the file exists, or a field is not valid.
    """
    path = directory() / f"{name}.yaml"
    if path.exists():
        raise SiteError(f"{path} exists already; edit it")
    if microns_per_px is None:
        scale: dict[str, Any] = {
            "scale_source": "not known; assumed, correct it",
            "assumed_microns_per_px": ASSUMED_MICRONS_PER_PX,
        }
    else:
        scale = {"scale_source": "given at 'smearline site new'"}
    known = dict.fromkeys(("laboratory", "scanner", "stain"), "unknown") | {"origin": "real", "use": "research"}
    try:
        site = Site.model_validate({"name": name, "microns_per_px": microns_per_px, **known, **scale})
    except ValidationError as error:
        raise SiteError(f"site '{name}': {error}") from error
    path.write_text(yaml.safe_dump(site.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
