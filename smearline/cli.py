"""The command `smearline`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from smearline import __version__, data_commands, plain_json
from smearline.commands import app, outside, progress_line
from smearline.errors import SmearlineError

site_app = typer.Typer(no_args_is_help=True, help="The files of the laboratories.")
app.add_typer(site_app, name="site")

Model = Annotated[Path, typer.Option("--model", help="A model folder (recogniser.onnx, model.json).")]
Cells = Annotated[Path, typer.Option("--cells", help="A data set: the folder that import wrote into.")]


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="The layout: pbc, wbcatt, jhu, zheng, bccd, lmu, folder.")],
    path: Annotated[Path, typer.Argument(help="The folder as its owner publishes it.")],
    site: Annotated[str, typer.Option(help="The site, by the name of its file in sites/.")],
    into: Annotated[Path, typer.Option(help="The data set to add to.")],
    map_: Annotated[
        Path | None, typer.Option("--map", help="YAML of class name to code, in place of the source's own.")
    ] = None,
    microns_per_px: Annotated[
        float | None, typer.Option(help="The scale of these images; must agree with the site's file.")
    ] = None,
) -> None:
    """Import images, labels and blood counts: every file ends up in the data set or in quarantine, with its reason."""
    from smearline import importing, sites, sources

    classes = _class_map(map_) if map_ else None
    with progress_line(f"import {source}") as progress:
        report = importing.import_source(
            sources.load(source, classes),
            path,
            sites.load(site),
            into,
            microns_per_px=microns_per_px,
            progress=progress,
        )
    print(report)


def _class_map(path: Path) -> dict[str, str | None]:
    from smearline.errors import ImportSourceError

    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict):
        raise ImportSourceError(f"--map {path} holds no 'class: CODE' lines (CODE may be null: no label)")
    return {str(k): None if v is None else str(v) for k, v in given.items()}


@site_app.command("new")
def site_new(
    name: Annotated[str, typer.Argument(help="Lower case letters, digits and underscores.")],
    microns_per_px: Annotated[
        float | None, typer.Option(help="From the scanner's manual or a calibration slide.")
    ] = None,
) -> None:
    """Write the file of a new site, to be completed by hand."""
    from smearline import sites

    path = sites.new(name, microns_per_px)
    print(f"wrote {path}: complete it (laboratory, scanner, stain, where the scale comes from), then import")
    if microns_per_px is None:
        print(
            f"its scale is not known: {sites.ASSUMED_MICRONS_PER_PX} um/px is assumed, and predictions are flagged scale_assumed, "
            "until microns_per_px is given (from the scanner's manual or a calibration slide)"
        )


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="An empty folder; one folder a site is written into it.")],
    sites: Annotated[str, typer.Option(help="Comma-separated names of simulated sites.")] = "sim_north,sim_south",
    seed: int = 7,
    patients: Annotated[int, typer.Option(help="Patients a site.")] = 24,
    cells: Annotated[int, typer.Option(help="Cells a smear.")] = 70,
) -> None:
    """Draw simulated laboratories: images, labels, patients and blood counts. The same seed gives the same bytes."""
    from smearline import simulator
    from smearline import sites as site_files

    chosen = [site_files.load(name.strip()) for name in sites.split(",")]
    with progress_line("simulate") as progress:
        made = simulator.simulate(
            out, sites=chosen, seed=seed, num_patients=patients, cells_per_smear=cells, progress=progress
        )
    print(f"{made.num_images:,} images, {made.num_bytes:,} bytes in {out}")
    print(", ".join(f"{count} {kind}" for kind, count in made.num_by_type.items()))


@app.command()
def evaluate(
    model: Model,
    cells: Cells,
    out: Annotated[Path, typer.Option(help="metrics.json, predictions.parquet and evaluation.html are written here.")],
) -> None:
    """Judge a packaged recogniser on imported cells."""
    from smearline import evaluation, metrics, recognition

    with progress_line("recognise") as progress:
        figures = evaluation.evaluate(recognition.RecognitionModel(model), cells, out, progress=progress)
    print(f"cells   {out / 'predictions.parquet'}\nfigures {out / 'metrics.json'}")
    if "not_judged" in figures:
        print(figures["not_judged"])
        return
    print(f"page    {out / 'evaluation.html'}")
    for name, value in metrics.headline(figures).items():
        print(f"{name:44} {value:.4f}")


@app.command()
def differential(
    model: Model,
    cells: Cells,
    out: Annotated[Path, typer.Option(help="A Parquet file (or .csv): a row a smear.")],
) -> None:
    """The differential of each smear: shares of the 14 types with their intervals, rates of the characteristics."""
    from smearline import differential as domain
    from smearline import recognition

    with progress_line("recognise") as progress:
        summary, predictions = domain.differential(recognition.RecognitionModel(model), cells, out, progress)
    loose = int(predictions["smear"].isna().sum())
    print(
        f"{len(summary)} smears, {len(predictions) - loose} cells: {out}"
        + (f"; {loose} cells name no smear" if loose else "")
    )


@app.command()
def diagnose(
    model: Annotated[Path, typer.Option("--model", help="A package, or its folder 'diagnosis'.")],
    differentials: Annotated[Path, typer.Option(help="What 'smearline differential' wrote.")],
    out: Annotated[Path, typer.Option(help="A .parquet, .csv or .json file: a row a smear.")],
    cbc: Annotated[
        Path | None,
        typer.Option("--cbc", help="Blood counts: Sysmex XN export, plain CSV or JSON ({smear: {WBC: 4.2}})."),
    ] = None,
) -> None:
    """The diagnosis of each smear with its reasons, or an abstention with its own."""
    from smearline import cbc as blood_counts
    from smearline import differential as domain
    from smearline.diagnosis import DiagnosisModel
    from smearline.diagnosis_reasons import write_answers

    loaded, summary = DiagnosisModel(model), domain.read(differentials)
    counts, unmatched = blood_counts.read_for(cbc, summary) if cbc else (None, 0)
    answers = loaded.diagnose(summary, counts)
    write_answers(answers, out)
    print(f"{len(answers)} smears, origin {loaded.card.origin}, {loaded.card.intended_use}: {out}")
    for name, count in answers["group"].fillna("abstained").value_counts().items():
        print(f"  {name:12} {count}")
    if counts is not None:
        matched = summary["smear"].isin(counts["smear"]).sum()
        print(f"  blood counts for {matched} of these smears; {unmatched} samples are of other smears")
    for group, because in loaded.card.not_available.items():
        print(f"  {group} is never named: {because}")


@app.command()
def token(
    name: Annotated[str, typer.Argument(help="Who holds it: it stands in answers, reviews and approvals.")],
    roles: Annotated[str, typer.Option(help="Comma-separated, of recognise, diagnose, review, approve.")],
    sites: Annotated[str | None, typer.Option(help="Comma-separated; default: every site.")] = None,
    file: Annotated[Path | None, typer.Option(help="Default: the service's, tokens.yaml in $SMEARLINE_HOME.")] = None,
) -> None:
    """Make a bearer token and show it, once: the file keeps its hash alone. A line taken out of the file voids a token."""
    from smearline import tokens

    file = file or Path(os.environ.get("SMEARLINE_HOME") or ".smearline/service", "tokens.yaml")
    named = None if sites is None else [site.strip() for site in sites.split(",")]
    print(tokens.create(file, name, [role.strip() for role in roles.split(",")], named))


@app.command()
def trace(
    answer_id: Annotated[str, typer.Argument(help="As the service gave it.")],
    workspace: Annotated[Path, typer.Option(help="The workspace whose service answered.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What stands behind an answer: model, commit, data version, gate, approvals, that day's verdict."""
    found = outside("flows.trace").trace(workspace, answer_id)
    print(plain_json.shown(found, as_json))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


assert data_commands  # which registers the commands that ask and keep the data set


def main() -> None:
    """Entry point: an error that is the user's is one message, without a trace."""
    try:
        app()
    except (SmearlineError, OSError, yaml.YAMLError) as error:
        print(f"smearline: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        print(
            f"smearline: a file of the data set cannot be read ({error}): smearline verify says which", file=sys.stderr
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
