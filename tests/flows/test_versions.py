"""What changed between two versions of the data set, and whether it is whole, by the installed command in a workspace."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import CHECKOUT, put
from tiny import cell

from flows import versions
from flows.workspace import FlowError, Workspace, environment
from smearline import dataset, deletion

pytest_plugins = ["tiny_fixtures"]
DATA = Path("data")


def command(space: Workspace, *given: str) -> subprocess.CompletedProcess[str]:
    """`python -m smearline.cli`, which looks for the flows beside itself."""
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        [sys.executable, "-m", "smearline.cli", *given], cwd=space.folder, env=env, capture_output=True, text=True
    )


@pytest.fixture
def changed(space: Workspace) -> Workspace:
    """Two new images at 'lab', an image less at 'second' (its shard written anew), and labels added, removed and changed."""
    data = space.folder / "data"
    with dataset.CellWriter(data / "cells", "lab") as writer:
        for seed in (7000, 7001):
            writer.add(cell(seed, "lab", "new", "new"))
    (old,) = (data / "cells").glob("second-*.parquet")
    rows = dataset.pq.read_table(old)
    dataset.write_shard(data / "cells", "second", rows.slice(1))
    old.unlink()
    path = dataset.label_paths(data, "lab")[0]
    labels = dataset.pq.read_table(path).to_pylist()
    assert [row["value"] for row in labels[:2]] == ["BLAST", "BLAST"]
    labels[0]["value"], labels[1]["value"] = "MONO", "MONO"
    new = {**labels[3], "sha256": f"{7000:064x}"}
    dataset.write_table(dataset.pa.Table.from_pylist([*labels[:2], *labels[3:], new], schema=dataset.LABELS), path)
    space.commit("another version", *space.add_data(DATA))
    return space


def test_images_and_labels_that_came_went_and_changed_are_counted(changed: Workspace):
    found = versions.diff(changed.folder, DATA, "HEAD~1", "HEAD")
    assert found["shards"] == {"added": 2, "removed": 1}
    assert found["images"] == {"added": {"lab": 2}, "removed": {"second": 1}}
    changes = [{"name": "type", "old": "BLAST", "new": "MONO", "number": 2}]
    assert found["labels"] == {"added": 1, "removed": 1, "changed": 2, "changes": changes}
    back = versions.diff(changed.folder, DATA, "HEAD", "HEAD~1")
    assert (back["images"], back["labels"]["changed"]) == ({"added": {"second": 1}, "removed": {"lab": 2}}, 2)
    same = versions.diff(changed.folder, DATA, "HEAD", "HEAD")
    assert same["labels"] == {"added": 0, "removed": 0, "changed": 0, "changes": []}


def test_as_it_is_typed(changed: Workspace):
    said = command(changed, "diff", "HEAD~1", "HEAD", "--json")
    assert json.loads(said.stdout)["images"]["added"] == {"lab": 2}, said.stderr
    assert "added:\n    lab: 2" in command(changed, "diff", "HEAD~1").stdout
    assert "by:\n  site:" in command(changed, "stats").stdout
    said = command(changed, "diff", "HEAD~1", "nowhere")
    assert said.returncode == 2 and "'nowhere'" in said.stderr and "Traceback" not in said.stderr


def test_a_revision_whose_bytes_are_not_here_says_how_to_get_them(changed: Workspace):
    shutil.rmtree(changed.folder / ".dvc/cache/files")
    with pytest.raises(FlowError, match="dvc fetch"):
        versions.diff(changed.folder, DATA, "HEAD~1", "HEAD")


def test_verify_holds_the_bytes_against_the_version(changed: Workspace):
    whole = command(changed, "verify")
    assert "labels of images that no shard here holds" in whole.stdout  # of the image that was taken out above
    (shard,) = (changed.folder / "data/cells").glob("second-*.parquet")
    content = shard.read_bytes()
    shard.unlink()  # the cache may hold the same file
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = command(changed, "verify", "--json")
    found = {finding["where"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1 and found[f"cells/{shard.name}"]["kind"] == "damaged"
    remedy = found[f"cells/{shard.name}"]["remedy"].split(";")[0]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(remedy, shell=True, cwd=changed.folder, env=env, check=True)
    assert shard.read_bytes() == content, "what is said to be typed brings it back"


def test_forget_and_compact_as_they_are_typed(space: Workspace):
    said = command(space, "forget", "lab-p3", "--site", "lab", "--reason", "asked for it")
    assert said.returncode == 0 and "images 20, labels 20" in said.stdout, said.stderr
    assert len(dataset.index(space.folder / "data")) == 300
    assert "1 shards rewritten: 20 images" in command(space, "compact").stdout
    assert command(space, "forget", "nobody", "--site", "lab", "--reason", "a slip").returncode == 2


def test_a_deletion_is_told_when_it_is_made_and_not_again_when_the_bytes_go(space: Workspace):
    data = space.folder / "data"
    patient = "lab-p1"
    mine = set(dataset.index(data, ["sha256", "patient"]).query("patient == @patient")["sha256"])
    space.commit("before", *space.add_data(DATA))
    with dataset.CellWriter(data / "cells", "lab") as writer:
        writer.add(cell(7100, "lab", patient, "later"))  # comes and goes between two versions
    deletion.forget(data, "lab", patient, "asked for it", datetime.now(UTC))
    space.commit("forgotten", *space.add_data(DATA))
    found = versions.diff(space.folder, DATA, "HEAD~1", "HEAD")
    assert found["images"] == {"added": {}, "removed": {"lab": len(mine)}}
    back = versions.diff(space.folder, DATA, "HEAD", "HEAD~1")
    assert back["images"] == {"added": {"lab": len(mine)}, "removed": {}}
    deletion.compact(data)
    space.commit("compacted", *space.add_data(DATA))
    assert versions.diff(space.folder, DATA, "HEAD~1", "HEAD")["images"] == {"added": {}, "removed": {}}
    assert versions.diff(space.folder, DATA, "HEAD~2", "HEAD")["images"] == {"added": {}, "removed": {"lab": len(mine)}}
    assert versions.diff(space.folder, DATA, "HEAD", "HEAD~2")["images"] == {"added": {"lab": len(mine)}, "removed": {}}


def test_data_that_are_older_than_their_pointers_are_never_made_a_version(space: Workspace):
    data = space.folder / "data"
    space.commit("first", *space.add_data(DATA))
    shutil.copytree(data, space.folder.parent / "old data")
    deletion.forget(data, "lab", "lab-p1", "asked for it", datetime.now(UTC))
    space.commit("forgotten", *space.add_data(DATA))
    record = space.folder / ".smearline" / "data-version.json"
    assert not space.data_changed(DATA)
    newest = record.read_text()
    for name in ("cells", "labels"):  # as in a clone that had the first version, after git pull
        shutil.rmtree(data / name)
        shutil.copytree(space.folder.parent / "old data" / name, data / name)
    record.write_text(json.dumps(json.loads(newest) | {"data/cells": "0.dir"}))
    with pytest.raises(FlowError, match="dvc checkout"):
        space.data_changed(DATA)
    found = json.loads(command(space, "verify", "--json").stdout)
    assert [f["kind"] for f in found if f["kind"] in ("behind", "unversioned", "missing")] == ["behind"]
    record.write_text(newest)  # the data were that version, and somebody changed them here
    assert space.data_changed(DATA)


@pytest.mark.mission("data that are older than what git pull brought are never made a version nor trained on")
def test_after_a_git_pull_without_a_dvc_pull_the_data_are_behind(space: Workspace):
    """DVC's cache holds nothing of the version that was pulled: `dvc status` says 'not in cache', and no more."""
    data = space.folder / "data"
    space.commit("first", *space.add_data(DATA))
    shutil.copytree(data, space.folder.parent / "old data")
    record = (space.folder / ".smearline" / "data-version.json").read_text()
    deletion.forget(data, "lab", "lab-p1", "asked for it", datetime.now(UTC))
    space.commit("forgotten, elsewhere", *space.add_data(DATA))
    shutil.rmtree(space.folder / ".dvc" / "cache")
    for name in ("cells", "labels"):
        shutil.rmtree(data / name)
        shutil.copytree(space.folder.parent / "old data" / name, data / name)
    put(space.folder / ".smearline" / "data-version.json", record)
    for asked in (space.data_changed, space.refuse_unversioned):
        with pytest.raises(FlowError, match="dvc checkout"):
            asked(DATA)
    assert (space.folder / ".smearline" / "data-version.json").read_text() == record


@pytest.mark.mission("a deletion that was pulled is not undone, though DVC alone fetched the data before")
def test_data_of_an_earlier_version_are_behind_though_nothing_was_noted(space: Workspace):
    data = space.folder / "data"
    space.commit("first", *space.add_data(DATA))
    shutil.copytree(data, space.folder.parent / "old data")
    deletion.forget(data, "lab", "lab-p1", "asked for it", datetime.now(UTC))
    space.commit("forgotten, elsewhere", *space.add_data(DATA))
    for name in ("cells", "labels"):  # a second clone, whose first version `dvc pull` brought
        shutil.rmtree(data / name)
        shutil.copytree(space.folder.parent / "old data" / name, data / name)
    (space.folder / ".smearline" / "data-version.json").unlink()
    found = json.loads(command(space, "verify", "--json").stdout)
    assert [f["kind"] for f in found if f["kind"] in ("behind", "unversioned", "missing")] == ["behind"]
    with pytest.raises(FlowError, match=r"data/cells, data/labels.*dvc checkout"):
        space.data_changed(DATA)
    space.run("dvc", "checkout", "-q")
    (shard,) = (data / "cells").glob("second-*.parquet")
    shard.unlink()  # what no version had is a change
    assert space.data_changed(DATA)


@pytest.mark.mission("a deletion of which a part was committed goes on, and is not called behind")
def test_a_deletion_that_was_half_committed_is_still_to_be_committed(space: Workspace):
    space.commit("first", *space.add_data(DATA))
    deletion.forget(space.folder / "data", "lab", "lab-p1", "asked for it", datetime.now(UTC))
    found = json.loads(command(space, "verify", "--json").stdout)
    assert found and all("dvc add data/cells data/labels and git commit" in f["remedy"] for f in found)
    space.run("dvc", "add", "-q", "data/cells")
    space.commit("a half", "data/cells.dvc")
    assert space.data_changed(DATA)
    assert {f["kind"] for f in json.loads(command(space, "verify", "--json").stdout)} == {"unversioned"}
    space.add_data(DATA)  # and killed
    assert space.data_changed(DATA)
    space.commit("whole", *space.add_data(DATA))
    assert not space.data_changed(DATA)


def test_data_that_changed_are_seen_though_the_cache_is_empty_and_so_is_a_table_that_is_gone(space: Workspace):
    space.commit("first", *space.add_data(DATA))
    shutil.rmtree(space.folder / ".dvc" / "cache")
    space.refuse_unversioned(DATA)
    deletion.forget(space.folder / "data", "lab", "lab-p1", "asked for it", datetime.now(UTC))
    assert space.data_changed(DATA)
    space.commit("forgotten", *space.add_data(DATA))
    space.refuse_unversioned(DATA)
    shutil.rmtree(space.folder / "data" / "labels")
    with pytest.raises(FlowError, match=r"data/labels \(deleted\)"):
        space.refuse_unversioned(DATA)


def test_a_fresh_clone_is_verified(space: Workspace):
    shutil.rmtree(space.folder / ".smearline", ignore_errors=True)
    assert command(space, "verify").returncode == 0


KILLED_PUSH = """
import importlib, os
collect = importlib.import_module("dvc_data.index.collect")
from dvc.repo import Repo
whole = collect._collect_from_index
def half(cache, prefix, index, *given, **more):
    class Half:
        def iteritems(self, key):
            entries = list(index.iteritems(key))
            return iter(entries[: len(entries) // 2])
        def __getitem__(self, key):
            return index[key]
    whole(cache, prefix, Half(), *given, **more)
    cache.commit()
    os._exit(9)
collect._collect_from_index = half
Repo(".").push()
"""


@pytest.mark.mission("a push that was killed while it made its list loses nothing")
def test_after_a_killed_push_the_next_one_takes_everything(tmp_path: Path):
    pushed = {}
    for way in ("as DVC does", "anew"):
        space, remote = Workspace(tmp_path / way / "w"), tmp_path / way / "remote"
        lists = {"DVC_SITE_CACHE_DIR": str(tmp_path / way / "lists")}
        (space.folder / "d").mkdir(parents=True)
        for number in range(6):
            (space.folder / "d" / str(number)).write_text(str(number))
        space.git("init", "-q")
        for line in (["init", "-q"], ["add", "-q", "d"], ["remote", "add", "-q", "-d", "there", str(remote)]):
            space.run("dvc", *line)
        killed = subprocess.run([sys.executable, "-c", KILLED_PUSH], cwd=space.folder, env=environment() | lists)
        assert killed.returncode == 9
        space.run("dvc", "push", "-q", variables=space.listed_anew() if way == "anew" else lists)
        pushed[way] = sum(path.is_file() for path in remote.rglob("*"))
    assert pushed["anew"] == 7, "six files and their listing"
    assert pushed["as DVC does"] < 7, "DVC itself is mended: Workspace.listed_anew can go"
