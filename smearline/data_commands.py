"""The commands of `smearline` that ask and keep the data set: stats, diff, verify, label, forget, compact."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from smearline.commands import app, outside, progress_line
from smearline.errors import DataError

Data = Annotated[Path, typer.Argument(help="The data set: the folder that import wrote into.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Splits = Annotated[Path | None, typer.Option(help="splits.parquet; default: beside the data set, where it is there.")]


@app.command()
def stats(data: Data = Path("data"), splits: Splits = None, as_json: AsJson = False) -> None:
    """What the data set holds, by site, scanner, stain, type, label source, month and split; no picture is read."""
    from smearline import stats as domain

    found = domain.stats(data, _splits(data, splits))
    print(json.dumps(found, indent=1) if as_json else domain.shown(found))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A revision of git: HEAD~1, a tag, a commit.")],
    new: Annotated[str, typer.Argument(help="Another.")] = "HEAD",
    data: Annotated[Path, typer.Option(help="The data set, in its workspace.")] = Path("data"),
    as_json: AsJson = False,
) -> None:
    """What changed in the data set between two versions: images by site, labels from what to what."""
    versions, space = outside("flows.versions"), _workspace(data)
    if space is None:
        raise DataError(f"{data} lies in no workspace under git and DVC, so that it has no versions")
    found = versions.diff(space, data.resolve().relative_to(space), old, new)
    print(json.dumps(found, indent=1) if as_json else versions.shown(found))


@app.command()
def verify(
    data: Data = Path("data"),
    splits: Splits = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte: damaged and missing shards, labels without an image, images in two splits; and how to get them back.

    Exits with 1 where something is wrong.
    """
    from smearline import integrity

    space, expected = _workspace(data), None
    if space is not None:
        expected = outside("flows.versions").files(space, data.resolve().relative_to(space))
    with progress_line("verify") as progress:
        found = integrity.verify(
            data, expected=expected, splits=_splits(data, splits), decode=decode, progress=progress
        )
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        for finding in found:
            touched = f"\n  {len(finding.smears)} smears: {', '.join(finding.smears[:10])}" if finding.smears else ""
            print(f"{finding.kind}: {finding.where}: {finding.detail}{touched}\n  {finding.remedy}")
        against = (
            "against its version"
            if expected
            else "by the shards' own checksums: under no version, a footer is not covered"
        )
        print(f"{len(found)} findings, {against}")
    if found:
        raise typer.Exit(1)


@app.command()
def recognise(
    model: Annotated[Path, typer.Option(help="A model folder (recogniser.onnx, model.json).")],
    cells: Annotated[Path, typer.Option(help="The data set.")],
    out: Annotated[Path, typer.Option(help="A folder: a Parquet file a shard, a row a cell.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    gpus_per_worker: float = 0,
) -> None:
    """Recognise a whole data set, as a Ray Data job on this machine or at $RAY_ADDRESS; run again, it does what is left."""
    domain = outside("pipelines.recognise")
    with progress_line("shards") as progress:
        done = domain.recognise(model, cells, out, workers=workers, gpus=gpus_per_worker, progress=progress)
    print(
        f"{done['images']:,} images in {done['shards']} shards, {done['seconds']} s; {done['there_before']} shards there before"
    )


@app.command()
def label(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet: sha256, and any of type and the characteristics.")],
    site: Annotated[str, typer.Option(help="The site of these images.")],
    by: Annotated[str, typer.Option(help="Who says so: a role or a pseudonym, no name.")],
    data: Annotated[Path, typer.Option(help="The data set.")] = Path("data"),
    supersede: Annotated[
        bool, typer.Option("--supersede", help="What was said before of the same image and name goes.")
    ] = False,
) -> None:
    """Take labels in from a table. Without --supersede, labels that differ from earlier ones put their image in conflict."""
    from datetime import UTC, datetime

    from smearline import labelling

    done = labelling.label(data, site, table, by, datetime.now(UTC), supersede=supersede)
    print(f"{done['labels']} labels taken, {done['superseded']} earlier ones superseded")


@app.command()
def forget(
    patient: Annotated[str, typer.Argument(help="The patient, as the laboratory knows him or by pseudonym.")],
    site: Annotated[str, typer.Option(help="The site.")],
    reason: Annotated[str, typer.Option(help="Kept with the list of what was deleted; name nobody.")],
    data: Annotated[Path, typer.Option(help="The data set.")] = Path("data"),
    service: Annotated[
        Path | None, typer.Option(help="The service's folder; default: .smearline/service beside the data set.")
    ] = None,
) -> None:
    """Delete a patient: labels, blood counts and images leave the current version at once; also from the service's case store.

    The bytes go with `smearline compact`; docs/deletion.md says what old versions and remotes keep, and how to purge it.
    """
    from datetime import UTC, datetime

    from smearline import deletion, pseudonyms, sites

    place = sites.load(site)
    names = [pseudonyms.pseudonym(pseudonyms.key(place), site, "patient", patient), patient]
    home, found, unknown = service or data.resolve().parent / ".smearline" / "service", {}, []
    for name in names:
        try:
            found = deletion.forget(data, site, name, reason, datetime.now(UTC))
            break
        except DataError as error:
            unknown.append(error)
    if (home / "cases.sqlite").exists() or service:
        store = outside("serving.cases").CaseStore(home=home)
        for name in names:
            for what, number in store.forget(site, name).items():
                found[what] = found.get(what, 0) + number
    if not any(found.values()) and unknown:
        raise DataError(f"nobody was deleted: {unknown[0]}, and the case store knows no such patient either")
    print(", ".join(f"{what.replace('_', ' ')} {number}" for what, number in found.items()))
    print(f"next: smearline compact {data}, and make it a version (python -m flows ingest, or dvc add and git commit)")


@app.command()
def compact(data: Data = Path("data")) -> None:
    """Rewrite the shards that hold images of deleted patients, without those; no other shard is touched."""
    from smearline import deletion

    with progress_line("compact") as progress:
        done = deletion.compact(data, progress)
    print(f"{done['shards']} shards rewritten: {done['images']} images, {done['bytes']:,} bytes gone")


def _splits(data: Path, said: Path | None) -> Path | None:
    beside = data.resolve().parent / "splits.parquet"
    return said or (beside if beside.exists() else None)


def _workspace(data: Path) -> Path | None:
    return next((folder for folder in data.resolve().parents if (folder / ".dvc").is_dir()), None)
