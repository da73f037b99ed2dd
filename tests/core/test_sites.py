from pathlib import Path

import pytest
from conftest import CHECKOUT

from smearline import sites
from smearline.errors import SiteError


@pytest.mark.parametrize("name", sorted(p.stem for p in (CHECKOUT / "sites").glob("*.yaml")))
def test_every_site_file_is_valid(name: str):
    assert sites.load(name, CHECKOUT / "sites").use == "research"


def test_a_new_site_is_written_and_not_overwritten(sites_folder: Path):
    path = sites.new("hospital_b", microns_per_px=0.12)
    site = sites.load("hospital_b")
    assert (site.microns_per_px, site.scanner, site.identifiers, site.origin) == (0.12, "unknown", "private", "real")
    with pytest.raises(SiteError, match="exists already"):
        sites.new("hospital_b", microns_per_px=0.12)
    assert path.parent == sites_folder


def test_a_site_without_a_scale_needs_a_stated_fallback(sites_folder: Path):
    sites.new("somewhere")
    assert (sites.load("somewhere").microns_per_px, sites.load("somewhere").assumed_microns_per_px) == (None, 0.1)
    assert "correct it" in sites.load("somewhere").scale_source
    with pytest.raises(SiteError, match="pattern"):
        sites.new("Bad Name", microns_per_px=0.1)
