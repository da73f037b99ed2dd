"""The commands of `smearline` that ask and keep the data set: stats, diff, verify, label, forget, compact."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from smearline import plain_json
from smearline.commands import app, outside, progress_line
from smearline.errors import DataError

Data = Annotated[Path, typer.Argument(help="The data set: the folder that import wrote into.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
Splits = Annotated[Path | None, typer.Option(help="splits.parquet; default: beside the data set, where it is there.")]


@app.command()
def stats(data: Data = Path("data"), splits: Splits = None, as_json: AsJson = False) -> None:
    """What the data set holds, by site, scanner, stain, type, label source, month and split; no picture is read."""
    from smearline import stats as domain

    print(plain_json.shown(domain.stats(_set(data), _splits(_set(data), splits)), as_json))


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A revision of git: HEAD~1, a tag, a commit.")],
    new: Annotated[str, typer.Argument(help="Another.")] = "HEAD",
    data: Annotated[Path, typer.Option(help="The data set, in its workspace.")] = Path("data"),
    as_json: AsJson = False,
) -> None:
    """What changed in the data set between two versions: images by site, labels from what to what."""
    versions, data, space = outside("flows.versions"), _set(data), _workspace(data)
    if space is None:
        raise DataError(f"{data} lies in no workspace under git and DVC, so that it has no versions")
    found = versions.diff(space, data.resolve().relative_to(space), old, new)
    print(plain_json.shown(found, as_json))


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

    data, space = _set(data), _workspace(data)
    version = outside("flows.versions").here(space, data.resolve().relative_to(space)) if space else None
    if version is None and not (data / "cells").is_dir():
        raise DataError(f"{data} holds no data set; get its version back (dvc pull), or import images first")
    with progress_line("verify") as progress:
        found = integrity.verify(data, version, splits=_splits(data, splits), decode=decode, progress=progress)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        for finding in found:
            touched = f"\n  {len(finding.smears)} smears: {', '.join(finding.smears[:10])}" if finding.smears else ""
            print(f"{finding.kind}: {finding.where}: {finding.detail}{touched}\n  {finding.remedy}")
        against = (
            "against its version"
            if version
            else "by the files' own page checksums: under no version, what stands between the pages is not covered"
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
        done = domain.recognise(model, _set(cells), out, workers=workers, gpus=gpus_per_worker, progress=progress)
    print(
        f"{done['images']:,} images in {done['shards']} shards, {done['seconds']} s; {done['there_before']} shards there before"
    )


@app.command()
def adapt(
    model: Annotated[Path, typer.Option(help="The model folder to go on from.")],
    cells: Annotated[Path, typer.Option(help="A data set of the new site.")],
    out: Annotated[Path, typer.Option(help="The adapted model folder; its weights come beside it.")],
    budget: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            help="Cells of the new site to label; default 100. Several: a model each, and a curve. 0: only its mix of types.",
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of the model; default: MODEL.safetensors.")] = None,
) -> None:
    """A recogniser for a new site from a few labelled cells, which it chooses. In the workspace that made the model."""
    for found in outside("pipelines.adapt").adapt(model, _set(cells), budget or [100], out, weights).values():
        print(plain_json.shown(found, as_json=False))


@app.command("learning-curve")
def learning_curve(
    out: Annotated[Path, typer.Option(help="A folder for the page and its figures.")],
    share: Annotated[
        list[float] | None, typer.Option(help="Of the training patients, several times; default: 0.125, 0.25, 0.5, 1.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the whole data; a part is trained on for as many steps.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Other patients and another start, so many times.")] = 1,
) -> None:
    """How good the recogniser gets with a part of its data, and what more would bring. In a workspace; one training a share."""
    domain = outside("pipelines.learning_curve")
    told = domain.learning_curve(out, share or [0.125, 0.25, 0.5, 1], epochs, seeds)
    for name, words in domain.ERRORS.items():
        print(domain.sentence(told, name, words))
    print(f"page: {out / 'learning_curve.html'}")


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

    done = labelling.label(_set(data), site, table, by, datetime.now(UTC), supersede=supersede)
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

    from smearline import dataset, deletion, pseudonyms, sites

    data, key, now = _set(data), pseudonyms.key(sites.load(site)), datetime.now(UTC)
    once = pseudonyms.pseudonym(key, site, "patient", patient)
    names = [once, patient, pseudonyms.pseudonym(key, site, "patient", once)]
    home = service or Path(data.resolve().parent, os.environ.get("SMEARLINE_HOME") or ".smearline/service")
    cases = outside("serving.cases") if service or _has_cases(home) else None
    store, found = cases.CaseStore(home=home) if cases else None, Counter[str]()
    unknown: DataError | None = None
    for name in names:  # all: he may have been sent by his pseudonym, which the service made another of
        smears, images = (store.smears_of(site, name), store.images_of(site, name)) if store else (None, {})
        known, his = smears is not None, smears or ()
        try:
            found.update(deletion.forget(data, site, name, reason, now, smears=his, images=images, known=known))
        except DataError as error:
            unknown = unknown or error
            continue
        if store:
            found.update(store.forget(site, name, dataset.Forgotten(data)))
    if not found:
        raise DataError(
            f"nobody was deleted: {unknown}" + (", and the case store knows no such patient either" if cases else "")
        )
    print(", ".join(f"{what.replace('_', ' ')} {number}" for what, number in found.items()))
    if not cases:
        print(
            f"no case store at {home}: where a service keeps one elsewhere, run this again with --service or $SMEARLINE_STORE"
        )
    print(f"next: smearline compact {data}, and make it a version (python -m flows ingest, or dvc add and git commit)")


def _has_cases(home: Path) -> bool:
    return bool(os.environ.get("SMEARLINE_STORE")) or (home / "cases.sqlite").exists()


@app.command()
def compact(data: Data = Path("data")) -> None:
    """Rewrite the shards that hold images of deleted patients, without those; no other shard is touched."""
    from smearline import deletion

    with progress_line("compact") as progress:
        done = deletion.compact(_set(data), progress)
    print(f"{done['shards']} shards rewritten: {done['images']} images, {done['bytes']:,} bytes gone")


def _set(data: Path) -> Path:
    """The data set, where its folder of images was named."""
    return data.parent if data.name == "cells" else data


def _splits(data: Path, said: Path | None) -> Path | None:
    beside = data.resolve().parent / "splits.parquet"
    return said or (beside if beside.exists() else None)


def _workspace(data: Path) -> Path | None:
    return next((folder for folder in data.resolve().parents if (folder / ".dvc").is_dir()), None)
