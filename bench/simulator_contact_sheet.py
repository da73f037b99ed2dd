"""A contact sheet of simulated cells: rows of types, then of characteristics without and with, at two sites.

python bench/simulator_contact_sheet.py [--out docs/img/simulated_cells.jpg] [--sites sim_north sim_south]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from smearline import sites, vocabulary
from smearline.simulator.cells import Cell
from smearline.simulator.field import picture
from smearline.simulator.optics import look_of, simulation_of
from smearline.simulator.population import cell_of_type

CAPTION_PX = 14
# characteristic -> (type to show it on, values to show)
SHOWN = {
    "cell_size": ("NEUT_SEG", ("small", "big")),
    "cell_shape": ("LYMPH", ("round", "irregular")),
    "nucleus_shape": ("MONO", ("unsegmented-indented", "irregular")),
    "nuclear_cytoplasmic_ratio": ("LYMPH", ("low", "high")),
    "chromatin_density": ("MONO", ("densely", "loosely")),
    "cytoplasm_vacuole": ("MONO", ("no", "yes")),
    "cytoplasm_texture": ("MONO", ("clear", "frosted")),
    "cytoplasm_colour": ("LYMPH", ("light blue", "purple blue")),
    "granule_type": ("BASO", ("small", "coarse")),
    "granule_colour": ("EOS", ("pink", "red")),
    "granularity": ("NEUT_SEG", ("no", "yes")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/img/simulated_cells.jpg"))
    parser.add_argument("--sites", nargs=2, default=["sim_north", "sim_south"])
    parser.add_argument("--tile", type=int, default=92, help="side of a picture on the sheet, px")
    parser.add_argument("--columns", type=int, default=4, help="pictures per site and row")
    parser.add_argument("--quality", type=int, default=52)
    args = parser.parse_args()
    known = vocabulary.load()
    rows: list[tuple[str, list[Cell]]] = []
    for kind, cell_type in known.types.items():
        cells = [cell_of_type(kind, {}, np.random.default_rng([5, i])) for i in range(args.columns)]
        rows.append((f"{kind}: {cell_type.name}", cells))
    for name, characteristic in known.characteristics.items():
        kind, values = SHOWN.get(name, (characteristic.applies_to[0], characteristic.values))
        cells = []
        for value in values:
            fixed = {name: value}
            if name == "granularity" and value == "no":
                fixed["granule_type"] = fixed["granule_colour"] = "nil"
            if name == "granule_type":
                fixed["granule_colour"] = "purple"
            if name == "granule_colour":
                fixed["granule_type"] = "round"
            cells += [
                cell_of_type(kind, {name: 0.0}, np.random.default_rng([6, i]), **fixed)
                for i in range(args.columns // 2)
            ]
        rows.append((f"{name} ({kind}): {values[0]} | {values[-1]}", cells))
    sheet = _sheet(rows, args.sites, args.tile, args.columns)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out, quality=args.quality)
    print(f"{args.out}: {sheet.width}x{sheet.height} px, {args.out.stat().st_size // 1000} kB")


def _sheet(rows: list[tuple[str, list[Cell]]], names: list[str], tile: int, columns: int) -> Image.Image:
    """Both sites side by side, and the rows in two halves beside each other."""
    per_half = (len(rows) + 1) // 2
    block = tile * columns * len(names) + 10
    sheet = Image.new("RGB", (2 * block + 20, per_half * (tile + CAPTION_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (caption, cells) in enumerate(rows):
        left, top = (row // per_half) * (block + 20), (row % per_half) * (tile + CAPTION_PX)
        pen.text((left + 2, top + 1), f"{caption}   [{' | '.join(names)}]", fill="black")
        for column_block, name in enumerate(names):
            site = sites.load(name)
            simulation = simulation_of(site)
            assert site.microns_per_px is not None
            for column, cell in enumerate(cells):
                look = look_of(simulation, site.microns_per_px, np.random.default_rng([row, column, column_block]))
                image = picture(
                    cell, simulation.image_px, site.microns_per_px, look, 0.6, np.random.SeedSequence([1, row, column])
                )
                at = (left + column_block * (tile * columns + 5) + column * tile, top + CAPTION_PX)
                sheet.paste(Image.fromarray(image).resize((tile, tile), Image.Resampling.LANCZOS), at)
    return sheet


if __name__ == "__main__":
    main()
