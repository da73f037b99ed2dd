"""The commands as a user types them."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import picture, put

from smearline import tokens


def smearline(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smearline.cli", *arguments], capture_output=True, text=True, cwd=folder
    )


def test_import_prints_numbers_that_add_up(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "raw" / "blast" / "a.jpg", picture(1))
    put(tmp_path / "raw" / "blast" / "b.jpg", b"broken")
    done = smearline("import", "folder", str(tmp_path / "raw"), "--site", "lab", "--into", str(tmp_path / "d"))
    assert done.returncode == 0, done.stderr
    assert "2 files found = 1 imported + 0 there already + 0 tables read + 1 quarantined" in done.stdout
    assert "1 unreadable" in done.stdout
    assert {p.name for p in (tmp_path / "d").iterdir()} >= {"cells", "labels", "cbc", "quarantine.parquet"}


def test_a_users_mistake_is_one_message_without_a_trace(tmp_path: Path, sites_folder: Path):
    for arguments, says in (
        (["import", "folder", str(tmp_path / "none"), "--site", "lab", "--into", str(tmp_path / "d")], "is no folder"),
        (["import", "fodler", str(tmp_path), "--site", "lab", "--into", str(tmp_path / "d")], "nearest: 'folder'"),
        (["import", "folder", str(tmp_path), "--site", "lba", "--into", str(tmp_path / "d")], "smearline site new lba"),
        (
            ["evaluate", "--model", str(tmp_path), "--cells", str(tmp_path), "--out", str(tmp_path / "o")],
            "is no model folder",
        ),
        (["site", "new", "Bad Name"], "pattern"),
    ):
        done = smearline(*arguments)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
        assert says in done.stderr, done.stderr


def test_a_token_is_made_and_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "service" / "tokens.yaml"
    done = smearline("token", "haematologist", "--roles", "review, approve", "--sites", "lab", "--file", str(file))
    assert done.returncode == 0, done.stderr
    holder = tokens.holder(file, done.stdout.strip())
    assert (holder.name, holder.roles, holder.sites) == ("haematologist", {"review", "approve"}, {"lab"})
    assert done.stdout.strip() not in file.read_text()
    assert "unknown role 'aprove'" in smearline("token", "x", "--roles", "aprove", "--file", str(file)).stderr
    monkeypatch.setenv("SMEARLINE_HOME", str(tmp_path / "elsewhere"))
    other = smearline("token", "x", "--roles", "review").stdout.strip()
    assert tokens.holder(tmp_path / "elsewhere" / "tokens.yaml", other).name == "x", "where the service looks for it"


def test_a_map_that_is_none_is_refused(tmp_path: Path, sites_folder: Path):
    put(tmp_path / "raw" / "weird" / "a.jpg", picture(1))
    put(tmp_path / "map.yaml", "weird: BLASTT\n")
    arguments = ["import", "folder", str(tmp_path / "raw"), "--site", "lab", "--into", str(tmp_path / "d")]
    done = smearline(*arguments, "--map", str(tmp_path / "map.yaml"))
    assert done.returncode == 2
    assert "'BLASTT' is no cell type; nearest: 'BLAST'" in done.stderr
    put(tmp_path / "map.yaml", "weird: BLAST\n")
    assert smearline(*arguments, "--map", str(tmp_path / "map.yaml")).returncode == 0
