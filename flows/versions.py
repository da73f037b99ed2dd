"""Versions of the data set, as DVC and git hold them, and what changed between two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from dvc.repo import Repo

from flows.workspace import BehindVersion, FlowError, Workspace
from smearline import dataset
from smearline.integrity import Version

_DELETED = "cells/deleted/images.parquet"
_IMAGES = pa.schema([("sha256", pa.string()), ("site", pa.string())])
_SAID = ("sha256", "name", "value", "source_label", "labelled_by", "role", "source")


class NoVersion(FlowError):
    """There is no version of the data set."""


def here(workspace: Path, data: Path) -> Version | None:
    """The version of the data set at `data`, as the pointers say that lie there; None: there is none.

    Raises:
        FlowError: a listing is neither in the cache nor fetched.
    """
    with Repo(str(workspace)) as repo:
        try:
            found = _files(repo, data, None)
        except NoVersion:
            return None
        copies = {name: Path(repo.cache.local.oid_to_path(md5)) for name, md5 in found.items()}
    try:
        Workspace(workspace).data_changed(data)
    except BehindVersion:
        return Version(found, copies=copies, behind=True)
    return Version(found, copies=copies)


def diff(workspace: Path, data: Path, old: str, new: str) -> dict[str, Any]:
    """What changed in the data set between two revisions of git, from the cache: only files that differ are read.

    Returns:
        shards (added, removed), images (added, removed; by site), labels (added, removed, and changed from what to what), and the
        other files that differ.

    Raises:
        FlowError: there is no such revision, no version of the data in it, or a file that differs is not in the cache.
    """
    with Repo(str(workspace)) as repo:
        before, after = _files(repo, data, old), _files(repo, data, new)
        gone = {name: md5 for name, md5 in before.items() if after.get(name) != md5}
        came = {name: md5 for name, md5 in after.items() if before.get(name) != md5}
        cached = {md5: Path(repo.cache.local.oid_to_path(md5)) for md5 in {*before.values(), *after.values()}}
    unchanged = {name: cached[md5] for name, md5 in after.items() if before.get(name) == md5}
    if missing := [name for name, md5 in {**gone, **came}.items() if not cached[md5].exists()]:
        raise FlowError(f"not in DVC's cache: {', '.join(missing[:3])} and so on; get them: dvc fetch --all-commits")
    images = [_read(named, "cells/", ("sha256", "site"), cached) for named in (gone, came)]
    was, now = _without_deleted(images, (gone, came), cached, unchanged)
    labels = [_read(named, "labels/cells-", _SAID, cached) for named in (gone, came)]
    return {
        "old": old,
        "new": new,
        "shards": {"added": _number(came, "cells/"), "removed": _number(gone, "cells/")},
        "images": {
            "added": _by_site(dataset.without(now, was["sha256"])),
            "removed": _by_site(dataset.without(was, now["sha256"])),
        },
        "labels": _labels(*labels),
        "other_files": sorted({n for n in {**gone, **came} if not n.startswith(("cells/", "labels/cells-"))}),
    }


def _files(repo: Repo, data: Path, rev: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with repo.switch(rev or "workspace"):
            for out in repo.index.outs:
                path = Path(repo.root_dir, *out.fs.parts(out.fs_path)[len(out.fs.parts(repo.root_dir)) :])
                if out.stage.cmd or not path.is_relative_to(Path(repo.root_dir, data)):
                    continue
                name = path.relative_to(Path(repo.root_dir, data)).as_posix()
                tree = out.get_obj()
                if tree is None:
                    raise FlowError(f"the listing of {out} is not in DVC's cache; get it: dvc fetch --all-commits")
                if out.hash_info.isdir:
                    found |= {f"{name}/{'/'.join(key)}": info.value for key, _meta, info in tree}
                else:
                    found[name] = out.hash_info.value
    except FlowError:
        raise
    except Exception as error:  # dvc's, scm's and git's errors share no base class
        raise FlowError(f"the version '{rev or 'here'}' of {data} cannot be told: {error}") from error
    if not found:
        raise NoVersion(
            f"'{rev or repo.root_dir}' holds no version of {data}; make one: dvc add {data}/cells … && git commit"
        )
    return found


def _without_deleted(
    images: Sequence[pa.Table], named: Sequence[Mapping[str, str]], cached: Mapping[str, Path], same: Mapping[str, Path]
) -> list[pa.Table]:
    """The images (sha256, site) of shards that differ, as the list of deleted ones leaves them in either version; with those that
    were deleted from a shard that both versions have."""
    empty = _IMAGES.empty_table()
    paths = [cached[part[_DELETED]] if _DELETED in part else same.get(_DELETED) for part in named]
    old, new = (pq.read_table(path, schema=_IMAGES) if path else empty for path in paths)
    left = [dataset.without(mine, gone["sha256"]) for mine, gone in zip(images, (old, new), strict=True)]
    for side, (one, other) in enumerate(((new, old), (old, new))):
        if len(lately := dataset.without(one, other["sha256"])):
            shards = [path for name, path in same.items() if name.startswith("cells/") and "/deleted/" not in name]
            kept = [pq.read_table(path, columns=["sha256"])["sha256"] for path in shards]
            stood = pa.chunked_array([chunk for column in kept for chunk in column.chunks], pa.string())
            left[side] = pa.concat_tables([left[side], lately.filter(pc.is_in(lately["sha256"], stood))])
    return left


def _read(named: Mapping[str, str], kind: str, columns: tuple[str, ...], cached: Mapping[str, Path]) -> pa.Table:
    schema = pa.schema([(dataset.LABELS if "name" in columns else dataset.CELLS).field(c) for c in columns])
    mine = [md5 for name, md5 in sorted(named.items()) if name.startswith(kind) and "/deleted/" not in name]
    return pa.concat_tables(
        [schema.empty_table(), *(pq.read_table(cached[md5], columns=list(columns)) for md5 in mine)]
    )


def _number(named: Mapping[str, str], kind: str) -> int:
    return sum(name.startswith(kind) and "/deleted/" not in name for name in named)


def _by_site(rows: pa.Table) -> dict[str, int]:
    counts = rows.group_by("site").aggregate([("sha256", "count")]).to_pylist()
    return {row["site"]: row["sha256_count"] for row in sorted(counts, key=lambda row: row["site"])}


def _labels(before: pa.Table, after: pa.Table) -> dict[str, Any]:
    """Labels that only one of the two says; of one image and name, a changed one."""
    whole = [
        pc.binary_join_element_wise(*(pc.fill_null(table[c], "") for c in _SAID), "\0") for table in (before, after)
    ]
    gone = before.filter(pc.invert(pc.is_in(whole[0], whole[1]))).to_pandas()
    came = after.filter(pc.invert(pc.is_in(whole[1], whole[0]))).to_pandas()
    key = ["sha256", "name", "role"]
    both = gone.merge(came, on=key, suffixes=("_old", "_new")).drop_duplicates(key)
    changed = both[both["value_old"] != both["value_new"]]
    counts = changed.groupby(["name", "value_old", "value_new"]).size().sort_values(ascending=False)
    same = len(both)
    return {
        "added": len(came) - same,
        "removed": len(gone) - same,
        "changed": len(changed),
        "changes": [
            {"name": name, "old": was, "new": now, "number": int(number)} for (name, was, now), number in counts.items()
        ],
    }
