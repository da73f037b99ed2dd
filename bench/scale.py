"""The data plane at the paper's size (`make scale`): 1,476,727 simulated images, since the paper's are not public.

    python -m bench.scale [--images 1476727] [--name scale] [--real-size] [--loose] [--keep]

Eight simulated sites, 6,000 smears (fewer images: as many fewer), in deliveries of 75 smears. A picture is drawn at 128 px and
saved in its eight orientations, which are distinct files of some 5 kB and no near duplicates of each other; labels are types
alone. Every step is one that a laboratory takes, by its command: import, `dvc add`, push, pull into a second clone, a day of 300
smears, a relabelling of 1 % of the cells, stats, diff, verify, the split with its search for near duplicates.

With --real-size the pictures are 256 px wide and have 16 kB, as those of PBC and JHU have; with --loose the same bytes are put
under DVC as loose files too, side by side (`make scale ARGS='--images 100000 --real-size --loose --name scale-100000'`).

What is done stands in .work/NAME/.smearline/scale.json: killed at any moment, the same command goes on. Needs about 25 GB (the
whole; it looks first) and takes them away again, unless --keep. Result: bench/results/NAME.json.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import simplejpeg
import yaml

from bench import results
from flows.lines import prepare
from flows.workspace import PRODUCT, Workspace, environment
from smearline import cbc, dataset, lookup, sites, vocabulary
from smearline.simulator import simulate

IMAGES, SITES, SMEARS, DELIVERY = 1_476_727, 8, 6000, 75
DAY = 300
"""Smears of the day that is added."""
SMALL, REAL_SIZE = {"px": 128, "quality": 88, "bytes": 5_000}, {"px": 256, "quality": 91, "bytes": 16_500}
COPIES = 3.4
"""On disk: the shards (hardlinked with DVC's cache), the remote's copy and the second clone's, and slack."""
LOOSE_COPIES = 2.5
VERSIONS = ("first version", "a day", "relabelled")
BAD = 2
"""Files of each delivery that go into quarantine: one that came under another class too, and a truncated one."""
TEMPLATES = ("sim_north", "sim_south", "sim_east")


class Scale:
    """The workspace and what was done in it."""

    def __init__(self, name: str, images: int, size: dict[str, int]) -> None:
        self.space = prepare(name, "demo")
        self.images, self.size = images, size
        self.file = self.space.folder / ".smearline" / "scale.json"
        self.file.parent.mkdir(exist_ok=True)
        self.done: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it once: what it returned the first time, with its seconds."""
        if name not in self.done:
            print(f"== {name}", flush=True)
            started = time.monotonic()
            found = work() or {}
            self.done[name] = {"seconds": round(time.monotonic() - started, 2), **found}
            unfinished = self.file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.done, indent=1))
            unfinished.replace(self.file)
            print(f"   {self.done[name]}", flush=True)
        return self.done[name]

    def run(self, *command: str, **variables: str) -> dict[str, Any]:
        """`python -m ...` in the workspace; its peak memory and what it says."""
        log, peak, started = self.space.folder / ".smearline" / "scale.log", 0, time.monotonic()
        with log.open("w+") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.space.folder,
                env=environment() | {"SMEARLINE_SITES": str(self.space.folder / "sites")} | variables,
                stdout=out,
            )
            while process.poll() is None:  # ru_maxrss would hold this process's own peak, too
                with contextlib.suppress(psutil.Error, OSError):
                    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    peak = max(peak, sum(part.memory_info().rss for part in tree))
                time.sleep(0.1)
            out.seek(0)
            said = out.read()
        if process.returncode:
            raise SystemExit(f"'{' '.join(command)}' failed:\n{said[-2000:]}")
        return {
            "command_seconds": round(time.monotonic() - started, 1),
            "peak_mb": round(peak / 1e6),
            "said": said[-600:],
        }


def site_files(space: Workspace, size: dict[str, int]) -> list[str]:
    """Eight laboratories, each with its own light and stain, from the three that come with the product."""
    names = [f"sim_{i:02d}" for i in range(SITES)]
    for number, name in enumerate(names):
        random = np.random.default_rng(number)
        file = yaml.safe_load((PRODUCT / "sites" / f"{TEMPLATES[number % 3]}.yaml").read_text(encoding="utf-8"))
        look = file["simulation"]
        look |= {"image_px": size["px"], "jpeg_quality": size["quality"], "prefix": chr(65 + number)}
        look["white_point"] = [
            float(w) for w in np.clip(np.array(look["white_point"]) + random.uniform(-8, 8, 3), 200, 255)
        ]
        for dye in ("eosin", "azure", "complex"):
            look[dye]["strength"] = float(look[dye]["strength"] * random.uniform(0.8, 1.2))
        file |= {
            "name": name,
            "laboratory": f"simulated ({number})",
            "microns_per_px": 25.6 / size["px"],
            "simulation": look,
        }
        (space.folder / "sites" / f"{name}.yaml").write_text(yaml.safe_dump(file, sort_keys=False), encoding="utf-8")
    space.commit("Eight simulated sites", "sites")
    return names


def deliveries(images: int) -> Iterator[tuple[int, int, list[int]]]:
    """(number, site, cells of each smear): 75 smears of a site at a time, the sites in turn; the cells sum to `images`."""
    smears = max(SITES, round(SMEARS * images / IMAGES))
    cells = [images // smears + (i < images % smears) for i in range(smears)]
    queues = [cells[i::SITES] for i in range(SITES)]
    number = 0
    for first in range(0, max(map(len, queues)), DELIVERY):
        for site, queue in enumerate(queues):
            if part := queue[first : first + DELIVERY]:
                yield number, site, part
                number += 1


def draw(folder: Path, sites_folder: Path, site: str, number: int, cells: list[int]) -> dict[str, Any]:
    """A delivery as a laboratory sends it: FOLDER/class/*.jpg, labels.csv, patients.csv. In a process of its own."""
    os.environ["SMEARLINE_SITES"] = str(sites_folder)
    if (folder / "complete").exists():
        found: dict[str, Any] = json.loads((folder / "complete").read_text())
        return found
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    place = sites.load(site)
    assert place.simulation is not None
    look = place.simulation | {
        "prefix": place.simulation["prefix"] + chr(65 + number // 26 % 26) + chr(65 + number % 26)
    }
    place = place.model_copy(update={"simulation": look})
    drawn = folder / "drawn"
    simulate(drawn, sites=[place], seed=1000 + number, num_patients=len(cells), cells_per_smear=-(-max(cells) // 8))
    rows, size = [], 0
    labels = pd.read_csv(drawn / site / "labels.csv", dtype=str, keep_default_na=False)
    for wanted, (_, smear) in zip(cells, labels.groupby("smear", sort=False), strict=True):
        left = wanted
        for row in smear.itertuples():
            data = (drawn / site / row.file).read_bytes()
            pixels = simplejpeg.decode_jpeg(data)
            for turn in range(min(8, left)):
                turned = np.rot90(pixels[:, ::-1] if turn > 3 else pixels, turn % 4)
                data = (
                    simplejpeg.encode_jpeg(
                        np.ascontiguousarray(turned), quality=look["jpeg_quality"], colorsubsampling="420"
                    )
                    if turn
                    else data
                )
                path = folder / f"{row.file[:-4]}_{turn}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                size += len(data)
                rows.append((path.relative_to(folder).as_posix(), row.type, row.patient, row.smear, row.acquired_at))
            left -= min(8, left)
    name, kind, *whose = rows[0]
    whole = (folder / name).read_bytes()
    for again, content, of in (
        ("again.jpg", whole, "MONO" if kind != "MONO" else "EOS"),
        ("short.jpg", whole[:-500], kind),
    ):
        path = (folder / name).with_name(f"{name.rsplit('/', 1)[-1][:-4]}_{again}")
        path.write_bytes(content)
        rows.append((path.relative_to(folder).as_posix(), of, *whose))
    pd.DataFrame(rows, columns=["file", "type", "patient", "smear", "acquired_at"]).to_csv(
        folder / "labels.csv", index=False
    )
    shutil.move(drawn / site / "patients.csv", folder / "patients.csv")
    shutil.rmtree(drawn)
    told = {"images": len(rows) - BAD, "bytes": size, "draw_seconds": round(time.monotonic() - started, 2)}
    (folder / "complete").write_text(json.dumps(told))
    return told


def die_with_parent() -> None:
    """So that no process waits for work for ever when this one is killed (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def take(scale: Scale, command: tuple[str, ...], told: dict[str, Any]) -> dict[str, Any]:
    found = scale.run(*command)
    imported = re.search(
        rf"= (\d+) imported \+ (\d+) there already \+ \d+ tables read \+ {BAD} quarantined", found.pop("said")
    )
    assert imported and sum(map(int, imported.groups())) == told["images"], "an image was not taken"
    return {**told, **found}


def bring_in(scale: Scale, names: list[str], plan: list[tuple[int, int, list[int]]], what: str) -> None:
    """Draw and import deliveries, the next one being drawn while one is imported."""
    raw = scale.space.folder / "raw"
    todo = [d for d in plan if f"{what} {d[0]}" not in scale.done]
    there = sum(part["images"] for name, part in scale.done.items() if name.startswith(what))

    def drawn(pool: ProcessPoolExecutor, number: int, site: int, cells: list[int]) -> Future[dict[str, Any]]:
        folder = raw / f"{what}-{number}"
        return pool.submit(draw, folder, scale.space.folder / "sites", names[site], number, cells)

    with ProcessPoolExecutor(1, initializer=die_with_parent) as pool:
        coming = drawn(pool, *todo[0]) if todo else None
        for place, (number, site, _) in enumerate(todo):
            assert coming is not None
            told, folder = coming.result(), raw / f"{what}-{number}"
            coming = drawn(pool, *todo[place + 1]) if place + 1 < len(todo) else None
            (folder / "complete").unlink(missing_ok=True)  # it is no image of the delivery

            there += told["images"]
            command = ("smearline.cli", "import", "folder", str(folder), "--site", names[site], "--into", "data")
            scale.step(f"{what} {number}", partial(take, scale, command, {**told, "images_there": there}))
            shutil.rmtree(folder)


def tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def version(scale: Scale, what: str) -> None:
    """`dvc add`, a commit, status and push; with the bytes that went to the remote."""
    remote = PRODUCT / ".work" / "remotes" / scale.space.folder.name

    def push() -> dict[str, Any]:
        before = tree_bytes(remote) if remote.exists() else 0
        found = scale.run("dvc", "push", "-q", **scale.space.listed_anew())
        return {"peak_mb": found["peak_mb"], "bytes": tree_bytes(remote) - before}

    scale.step(f"{what}: dvc add", lambda: scale.space.commit(what, *scale.space.add_data(Path("data"))))
    scale.step(
        f"{what}: dvc status",
        lambda: {"peak_mb": scale.run("dvc", "status", "data/cells.dvc", "data/labels.dvc")["peak_mb"]},
    )
    scale.step(f"{what}: dvc push", push)


def relabel(scale: Scale, names: list[str]) -> dict[str, Any]:
    """One image in a hundred, told by its sha256, has another label, by `smearline label`."""
    count, data, codes = 0, scale.space.folder / "data", sorted(vocabulary.load().types)
    for name in names:
        sha256s = sorted(s for path in dataset.label_paths(data, name) for s in set(pd.read_parquet(path)["sha256"]))
        some = [s for s in sha256s if int(s[:8], 16) % 100 == 0]
        table = scale.space.folder / "raw" / f"relabel-{name}.csv"
        table.parent.mkdir(exist_ok=True)
        types = [codes[int(s[8:16], 16) % len(codes)] for s in some]
        pd.DataFrame({"sha256": some, "type": types}).to_csv(table, index=False)
        scale.run("smearline.cli", "label", str(table), "--site", name, "--by", "reader 2", "--supersede")
        count += len(some)
    return {"labels": count}


def second_clone(scale: Scale) -> dict[str, Any]:
    folder = PRODUCT / ".work" / f"{scale.space.folder.name}-second"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(scale.space.folder), str(folder)], check=True)
    remote = PRODUCT / ".work" / "remotes" / scale.space.folder.name
    second = Workspace(folder)
    second.run("dvc", "remote", "add", "--local", "-q", "-f", "-d", "local", str(remote))
    second.run("dvc", "config", "--local", "cache.type", "hardlink,copy")
    started = time.monotonic()
    parts = (f"data/{n}" for n in ("cells", "labels", "cbc", "quarantine.parquet"))
    second.run("dvc", "pull", "-q", *parts)
    return {"pull_seconds": round(time.monotonic() - started, 1), "bytes": tree_bytes(folder / "data")}


def pull_again(scale: Scale) -> dict[str, Any]:
    """The second clone takes what is new."""
    second = Workspace(PRODUCT / ".work" / f"{scale.space.folder.name}-second")
    before = tree_bytes(second.folder / ".dvc" / "cache")
    second.git("pull", "-q")
    started = time.monotonic()
    second.run("dvc", "pull", "-q", "data/cells", "data/labels")
    seconds = round(time.monotonic() - started, 1)
    return {"pull_seconds": seconds, "bytes": tree_bytes(second.folder / ".dvc" / "cache") - before}


def near_duplicates(scale: Scale) -> dict[str, Any]:
    """Pairs that the last split called near duplicates: every picture is another one, so each is a false alarm."""
    data = scale.space.folder / "data"
    with np.load(data / "local" / "near-duplicates.npz") as kept:
        images, pairs = len(kept["searched"]), kept["pairs"]
    files = dataset.read_tables(data / "local", "files-*.parquet", dataset.FILES)
    drawing = dict(zip(lookup.bits(pa.array(files["sha256"])), files["path"].str.rsplit("_", n=1).str[0], strict=True))
    same = sum(drawing[a] == drawing[b] for a, b in pairs)
    return {
        "images": images,
        "possible_pairs": images * (images - 1) // 2,
        "pairs": len(pairs),
        "pairs_of_one_drawing_turned": same,
        "images_in_a_pair": len(np.unique(pairs)),
    }


def table_digest(table: pd.DataFrame) -> str:
    """Of the rows, in whatever order they stand."""
    table = table.drop(columns="folder", errors="ignore")  # it holds a digest of the workspace's own path
    rows = pd.util.hash_pandas_object(table.astype(str), index=False).sort_values()
    return hashlib.sha256(rows.to_numpy().tobytes()).hexdigest()


def contents(scale: Scale) -> dict[str, Any]:
    """What the data set holds, to be compared with a run that was never killed."""
    data = scale.space.folder / "data"
    frame, labels = (
        dataset.index(data, ["sha256"]),
        dataset.read_labels(data),
    )  # raises where an image stands in it twice
    said = labels[["sha256", "name", "value", "labelled_by", "source", "conflicted"]]
    tables = {
        "labels": said,
        "patients": dataset.read_tables(data, "labels/patients-*.parquet", dataset.PATIENTS),
        "counts": dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS),
        "quarantine": dataset.read_tables(data, "quarantine.parquet", dataset.QUARANTINE),
        "files": dataset.read_tables(data, "local/files-*.parquet", dataset.FILES),
    }
    return {
        "images": len(frame),
        "images_digest": dataset.digest(frame),
        "conflicted": int(labels.loc[labels["conflicted"], "sha256"].nunique()),
        **{f"{name}_rows": len(table) for name, table in tables.items()},
        **{f"{name}_digest": table_digest(table) for name, table in tables.items()},
        "unfinished_files": len(list(data.rglob(".*.unfinished"))),
    }


def loose(scale: Scale, first: set[str]) -> None:
    """The same bytes as one file an image and one table of labels: first version, a day, a relabelling."""
    folder = PRODUCT / ".work" / f"{scale.space.folder.name}-loose"
    if not (folder / ".dvc").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        for command in (
            ["git", "init", "-q"],
            ["git", "config", "user.name", "s"],
            ["git", "config", "user.email", "s@localhost"],
        ):
            subprocess.run(command, cwd=folder, check=True)
        dvc = Workspace(folder)
        dvc.run("dvc", "init", "-q")
        dvc.run("dvc", "remote", "add", "-q", "-d", "near", str(folder / "remote"))
        dvc.run("dvc", "config", "cache.type", "hardlink,copy")
    data = scale.space.folder / "data"

    def files(of_first: bool) -> dict[str, Any]:
        count = 0
        for shard in dataset.shards(data):
            if (shard.name in first) != of_first:
                continue
            for rows in dataset.iter_rows(data, ["sha256", "image"], only=[shard]):
                for sha256, image in zip(rows["sha256"], rows["image"], strict=True):
                    path = folder / "images" / sha256[:2] / f"{sha256}.jpg"
                    path.parent.mkdir(exist_ok=True)
                    path.unlink(missing_ok=True)
                    path.write_bytes(image)
                    count += 1
        return {"files": count}

    def labels(turn: int) -> dict[str, Any]:
        table = dataset.read_labels(data)[["sha256", "value"]].assign(turn="")
        table.loc[table.index % 100 == turn, "turn"] = str(turn)
        (folder / "labels.csv").unlink(missing_ok=True)
        table.to_csv(folder / "labels.csv", index=False)
        return {"rows": len(table)}

    def push() -> dict[str, Any]:
        before = tree_bytes(folder / "remote") if (folder / "remote").exists() else 0
        Workspace(folder).run("dvc", "push", "-q")
        return {"bytes": tree_bytes(folder / "remote") - before}

    def write(turn: int) -> dict[str, Any]:
        return {**(files(turn == 0) if turn < 2 else {}), **labels(turn)}

    def run(*command: str) -> None:
        Workspace(folder).run("dvc", *command)

    for turn, what in enumerate(("first version", "a day", "relabelled")):
        scale.step(f"loose, {what}: write", partial(write, turn))
        scale.step(f"loose, {what}: dvc add", partial(run, "add", "-q", "images", "labels.csv"))
        scale.step(f"loose, {what}: dvc status", partial(run, "status"))
        scale.step(f"loose, {what}: dvc push", push)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--name", default="scale")
    parser.add_argument("--real-size", action="store_true", help="pictures of 16 kB, as those of PBC and JHU")
    parser.add_argument("--loose", action="store_true", help="the same bytes as loose files under DVC, too")
    parser.add_argument("--keep", action="store_true", help="leave the data set, its remote and its clone")
    given = parser.parse_args()
    size = REAL_SIZE if given.real_size else SMALL
    free, needed = shutil.disk_usage(PRODUCT).free, given.images * size["bytes"] * (COPIES + LOOSE_COPIES * given.loose)
    if not (PRODUCT / ".work" / given.name).exists() and free < needed:
        raise SystemExit(f"this needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free")
    (PRODUCT / ".work").mkdir(exist_ok=True)
    with Workspace(PRODUCT / ".work").lock("make scale", given.name):
        run(given, size)


def run(given: argparse.Namespace, size: dict[str, int]) -> None:
    (PRODUCT / ".work" / given.name / ".git" / "index.lock").unlink(missing_ok=True)  # of a git that was killed
    scale = Scale(given.name, given.images, size)
    space = scale.space
    space.run("dvc", "config", "--local", "cache.type", "hardlink,copy")
    names, plan = site_files(space, size), list(deliveries(given.images))
    bring_in(scale, names, plan, "import")
    version(scale, "first version")
    first = scale.step("shards", lambda: {"first": [path.name for path in dataset.shards(space.folder / "data")]})[
        "first"
    ]
    scale.step("first version: pull", lambda: second_clone(scale))
    scale.step("split", lambda: scale.run("pipelines.split"))
    smears = max(SITES, round(DAY * given.images / IMAGES))
    cells = given.images // max(SITES, round(SMEARS * given.images / IMAGES))
    day = [(900 + i, i, [cells] * (smears // SITES + (i < smears % SITES))) for i in range(SITES)]
    bring_in(scale, names, day, "day")
    version(scale, "a day")
    scale.step("a day: pull", lambda: pull_again(scale))
    scale.step("relabel", lambda: relabel(scale, names))
    version(scale, "relabelled")
    scale.step("relabelled: pull", lambda: pull_again(scale))
    scale.step("split after the day", lambda: scale.run("pipelines.split"))
    scale.step("near duplicates", lambda: near_duplicates(scale))
    made = {what: space.git("log", "-1", "--format=%h", f"--grep=^{what}$") for what in VERSIONS}
    commands: dict[str, tuple[str, ...]] = {"stats": ("stats",), "verify": ("verify",)}
    commands |= {f"diff since {what}": ("diff", made[what], made["relabelled"]) for what in VERSIONS[:2]}
    for what, command in commands.items():
        scale.step(what, partial(scale.run, "smearline.cli", *command))
    scale.step("first batch", lambda: scale.run("bench.first_batch"))
    scale.step("contents", lambda: contents(scale))
    if given.loose:
        loose(scale, set(first))
    results.write(given.name.replace("-", "_"), summary(scale, given.images))
    if not given.keep:
        for folder in (
            space.folder,
            PRODUCT / ".work" / f"{given.name}-second",
            PRODUCT / ".work" / "remotes" / given.name,
        ):
            shutil.rmtree(folder, ignore_errors=True)


def summary(scale: Scale, images: int) -> dict[str, Any]:
    done = scale.done
    took = [part for name, part in done.items() if name.startswith("import ")]
    day = [part for name, part in done.items() if name.startswith("day ")]
    total = {key: sum(part[key] for part in took) for key in ("images", "bytes", "draw_seconds", "seconds")}
    assert total["images"] == images, f"{total['images']} images were imported, and {images} were to be"
    peaks = {}
    for share in (0.1, 0.5, 1.0):
        at = min(took, key=lambda part: abs(part["images_there"] - share * images))
        peaks[f"{at['images_there']}"] = at["peak_mb"]
    return {
        "what": f"{images} simulated images of {total['bytes'] / images / 1000:.1f} kB, {SITES} sites; the paper's are not public",
        "import": {
            **total,
            "images_a_second": round(total["images"] / total["seconds"]),
            "mb_a_second": round(total["bytes"] / total["seconds"] / 1e6, 1),
            "peak_mb_at_images": peaks,
        },
        "draw": {"images_a_second": round(total["images"] / total["draw_seconds"])},
        "day": {key: sum(part[key] for part in day) for key in ("images", "bytes", "seconds")},
        "steps": {
            name: part for name, part in done.items() if name != "shards" and not name.startswith(("import ", "day "))
        },
    }


if __name__ == "__main__":
    os.chdir(PRODUCT)
    main()
