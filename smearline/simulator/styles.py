"""How each type looks: sizes in micrometres and dye amounts, set by eye against textbook cells, not measured."""

from __future__ import annotations

from dataclasses import dataclass

from smearline.simulator.canvas import Dyes


@dataclass(frozen=True)
class Style:
    diameter_um: tuple[float, float]
    """Mean and standard deviation."""
    nucleus: tuple[float, float]
    """Radius of a disc of the nucleus' area as a share of the cell's radius: mean and standard deviation."""
    cytoplasm: Dyes
    chromatin: tuple[float, float, float]
    """Amount of the purple complex, contrast, and share of coarse clumps in the texture."""
    granules: tuple[str, Dyes] | None = None
    shapes: tuple[str, ...] = ("unsegmented-round",)
    """Shapes of the nucleus, drawn evenly, where no characteristic names one."""
    eccentric: float = 0.25
    """How far the nucleus lies off the middle, as a share of the room there is."""
    rim: float = 0.0
    """Further azure along the cell's edge."""
    warp_um: float = 0.3
    """How far the outline wanders."""


STYLES: dict[str, Style] = {
    "NEUT_SEG": Style((12.7, 0.9), (0.60, 0.03), (0.13, 0.09, 0.03), (1.89, 0.38, 0.7), ("granules_small", (0.16, 0.0, 0.28))),
    "NEUT_BAND": Style((12.9, 0.9), (0.62, 0.03), (0.13, 0.10, 0.03), (1.79, 0.38, 0.7), ("granules_small", (0.15, 0.0, 0.28))),
    "METAMYELO": Style((13.4, 1.0), (0.66, 0.04), (0.13, 0.14, 0.04), (1.70, 0.38, 0.6), ("granules_small", (0.12, 0.0, 0.36)), ("unsegmented-indented",), 0.5),
    "MYELO": Style((13.9, 1.3), (0.68, 0.04), (0.09, 0.22, 0.05), (1.61, 0.38, 0.5), ("granules_small", (0.10, 0.0, 0.45)), ("unsegmented-round",), 0.7, 0.05),
    "PROMYELO": Style((15.8, 1.6), (0.72, 0.04), (0.04, 0.38, 0.12), (1.38, 0.30, 0.25), ("granules_azurophil", (0.1, 0.0, 1.1)), ("unsegmented-round", "unsegmented-round", "shallow"), 0.7, 0.1),
    "BLAST": Style((14.0, 1.8), (0.83, 0.04), (0.00, 0.50, 0.10), (1.38, 0.25, 0.15), None, ("unsegmented-round", "unsegmented-round", "unsegmented-round", "shallow", "shallow", "irregular"), 0.6, 0.25),
    "LYMPH": Style((9.6, 1.1), (0.84, 0.03), (0.02, 0.32, 0.02), (1.84, 0.32, 0.8), None, eccentric=0.5, rim=0.12),
    "LYMPH_ATYP": Style((12.4, 1.6), (0.73, 0.05), (0.01, 0.30, 0.03), (1.52, 0.34, 0.55), None, ("unsegmented-round", "unsegmented-round", "shallow"), 0.6, 0.12, 0.45),
    "PLASMA": Style((12.6, 1.4), (0.52, 0.04), (0.05, 0.85, 0.18), (1.79, 0.61, 0.9), None, eccentric=0.95, rim=0.15, warp_um=0.5),
    "MONO": Style((15.8, 1.4), (0.66, 0.04), (0.06, 0.26, 0.12), (1.43, 0.34, 0.45), None, eccentric=0.35, rim=0.06, warp_um=0.5),
    "EOS": Style((13.0, 0.9), (0.58, 0.03), (0.16, 0.12, 0.08), (1.79, 0.34, 0.6), ("granules_round", (0.55, 0.0, 0.15))),
    "BASO": Style((12.0, 1.1), (0.68, 0.04), (0.08, 0.14, 0.12), (1.24, 0.28, 0.3), ("granules_coarse", (0.0, 0.25, 1.7)), warp_um=0.4),
    "NRBC": Style((9.2, 0.9), (0.56, 0.06), (0.17, 0.27, 0.02), (2.12, 0.23, 0.9), None, eccentric=0.45),
    "PLT_LARGE": Style((8.4, 1.0), (0.0, 0.0), (0.05, 0.14, 0.12), (0.0, 0.0, 0.0), ("granules_azurophil", (0.1, 0.0, 0.8)), warp_um=0.6),
    "PLT": Style((3.0, 0.4), (0.0, 0.0), (0.05, 0.14, 0.16), (0.0, 0.0, 0.0), ("granules_azurophil", (0.1, 0.0, 0.9)), warp_um=0.25),
    "SMUDGE": Style((14.0, 2.0), (0.0, 0.0), (0.05, 0.05, 0.55), (0.0, 0.0, 0.0)),
    "ARTEFACT": Style((9.0, 2.5), (0.0, 0.0), (0.0, 0.5, 2.2), (0.0, 0.0, 0.0)),
    "UNIDENTIFIED": Style((12.5, 2.0), (0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
}  # fmt: skip
RED_CELL: Dyes = (0.17, 0.20, 0.0)
RED_CELL_DIAMETER_UM = (7.2, 0.45)
CYTOPLASM_COLOURS: dict[str, Dyes] = {
    "light blue": (0.02, 0.24, 0.0),
    "blue": (0.0, 0.50, 0.02),
    "purple blue": (0.04, 0.30, 0.22),
}
"""Replaces the ground colour of cells without granules; over granules it only tints (see cytoplasm.py)."""
GRANULE_COLOURS: dict[str, Dyes] = {"pink": (0.26, 0.0, 0.10), "red": (0.44, 0.0, 0.10), "purple": (0.08, 0.04, 0.85)}
GRANULE_TILES = {
    "small": "granules_small",
    "round": "granules_round",
    "coarse": "granules_coarse",
}
