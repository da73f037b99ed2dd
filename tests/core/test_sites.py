from pathlib import Path

import pytest
from conftest import CHECKOUT

from smearline import sites
from smearline.errors import SiteError


@pytest.mark.parametrize("name", sorted(p.stem for p in (CHECKOUT / "sites").glob("*.yaml")))
def test_every_site_file_is_valid(name: str):
    assert sites.load(name, CHECKOUT / "sites").use == "research"


def test_a_new_site_is_written_and_not_overwritten(sites_folder: Path):
    path = sites.new("hospital_b", microns_per_px=0.12, scanner="X100")
    site = sites.load("hospital_b")
    assert (site.microns_per_px, site.scanner, site.identifiers, site.origin) == (0.12, "X100", "private", "real")
    with pytest.raises(SiteError, match="exists already"):
        sites.new("hospital_b", microns_per_px=0.12)
    assert path.parent == sites_folder


def test_a_file_of_an_older_version_is_read_unless_it_says_what_nothing_heeds(sites_folder: Path):
    path = sites.new("older", microns_per_px=0.1)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + "reference_limits: {}\nblast_equivalents: []\n", encoding="utf-8")
    assert sites.load("older").microns_per_px == 0.1
    path.write_text(whole + "blast_equivalents: [promonocyte]\n", encoding="utf-8")
    with pytest.raises(SiteError, match="blast_equivalents"):
        sites.load("older")


def test_a_site_without_a_scale_needs_a_stated_fallback(sites_folder: Path):
    sites.new("somewhere")
    assert (sites.load("somewhere").microns_per_px, sites.load("somewhere").assumed_microns_per_px) == (None, 0.1)
    assert "correct it" in sites.load("somewhere").scale_source
    with pytest.raises(SiteError, match="pattern"):
        sites.new("Bad Name", microns_per_px=0.1)
    sites.new("nowhere", assumed_microns_per_px=0.1)
    assert sites.load("nowhere").microns_per_px is None
