"""What the tests share: pictures drawn for them, the real sets where they lie, and the closing account of the suite."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

os.environ |= {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}  # of what a test starts, too
CHECKOUT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("SMEARLINE_REAL_DATA", CHECKOUT.parent / "shared" / "data"))


def picture(seed: int, size: int = 64, kind: str = "JPEG", quality: int = 95) -> bytes:
    """An image file with a dark disc on a light ground with spots; another seed, another picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    pixels = np.full((size, size, 3), (250, 235, 215), float)
    for _ in range(12):
        cx, cy, radius = random.uniform(-0.5, 0.5), random.uniform(-0.5, 0.5), random.uniform(0.05, 0.14)
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = random.uniform(120, 220, 3)
    pixels[x**2 + y**2 < 0.04] = random.uniform(40, 120, 3)
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.fixture
def sites_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of site files of its own: 'lab' (0.2 um/px), 'second' (0.1 um/px), 'unscaled', and those of the checkout."""
    folder = tmp_path / "sites"
    folder.mkdir()
    for file in (CHECKOUT / "sites").glob("*.yaml"):
        put(folder / file.name, file.read_bytes())
    common = {
        "laboratory": "test",
        "scanner": "s",
        "stain": "s",
        "scale_source": "test",
        "origin": "real",
        "use": "research",
    }
    for name, more in (
        ("lab", {"microns_per_px": 0.2, "identifiers": "public"}),
        ("second", {"microns_per_px": 0.1, "identifiers": "private"}),
        ("unscaled", {"microns_per_px": None, "assumed_microns_per_px": 0.2, "identifiers": "public"}),
    ):
        put(folder / f"{name}.yaml", yaml.safe_dump({"name": name, **common, **more}))
    monkeypatch.setenv("SMEARLINE_SITES", str(folder))
    monkeypatch.setenv("SMEARLINE_KEY_FILE", str(tmp_path / "secret" / "pseudonym.key"))
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real sets, or a skip that says where they were looked for."""
    if not (REAL_DATA / "pbc").is_dir():
        pytest.skip(
            f"no real images in {REAL_DATA} (SMEARLINE_REAL_DATA names another place; docs/data.md says where they are had)"
        )
    return REAL_DATA


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None] | None:
    """What ran, what was skipped and why, and which part of the mission each skip leaves unproved."""
    say = terminalreporter.write_line
    stats = terminalreporter.stats
    terminalreporter.section("what was proved")
    folders: dict[str, int] = {}
    for report in stats.get("passed", []):
        if report.when == "call":
            folder = report.nodeid.split("/")[1]
            folders[folder] = folders.get(folder, 0) + 1
    say("ran: " + ", ".join(f"{count} of tests/{folder}" for folder, count in sorted(folders.items())))
    skipped = stats.get("skipped", [])
    if not skipped:
        say("skipped: nothing")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        part = next((value for name, value in report.user_properties if name == "mission"), "not named")
        say(f"skipped: {report.nodeid}\n  why: {reason}\n  unproved: {part}")
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if marker := item.get_closest_marker("mission"):
        item.user_properties.append(("mission", marker.args[0]))
