"""The audit log shows what was done to it."""

from pathlib import Path

import pytest

from flows import audit


@pytest.fixture
def log(tmp_path: Path) -> Path:
    for number in range(4):
        audit.append(tmp_path, "someone", "approve", version=f"v{number}", reason="looked at it; µm")
    return tmp_path


def rewrite(folder: Path, lines: list[str]) -> None:
    (folder / audit.LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_log_that_nobody_touched_is_whole(log: Path):
    assert audit.problems(log, [audit.head(log)]) == []
    assert [e["version"] for e in audit.entries(log, "approve")] == ["v0", "v1", "v2", "v3"]
    assert audit.problems(log.parent / "none") == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_changed_line_shows(log: Path, number: int):
    lines = (log / audit.LOG).read_text(encoding="utf-8").splitlines()
    lines[number] = lines[number].replace("someone", "nobody")
    rewrite(log, lines)
    assert len(audit.problems(log)) == 1


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_removed_line_shows(log: Path, number: int):
    lines = (log / audit.LOG).read_text(encoding="utf-8").splitlines()
    rewrite(log, lines[:number] + lines[number + 1 :])
    assert audit.problems(log)


def test_an_inserted_line_shows(log: Path):
    lines = (log / audit.LOG).read_text(encoding="utf-8").splitlines()
    audit.append(log, "someone", "approve", version="v9")
    forged = (log / audit.LOG).read_text(encoding="utf-8").splitlines()[-1]
    rewrite(log, [*lines[:2], forged, *lines[2:]])
    assert audit.problems(log)


def test_the_end_is_guarded_by_the_heads_in_the_tags(log: Path):
    head = audit.head(log)
    lines = (log / audit.LOG).read_text(encoding="utf-8").splitlines()
    for forged in (lines[:-1], [*lines[:-1], lines[-1].replace("v3", "v4")]):
        rewrite(log, forged)
        assert audit.problems(log) == []  # the chain alone cannot tell
        assert audit.problems(log, [head])


def test_a_line_that_was_cut_off_by_a_crash_is_written_over(log: Path):
    with (log / audit.LOG).open("a") as file:
        file.write('{"half')
    audit.append(log, "someone", "rollback")
    assert audit.problems(log) == []
    assert len(audit.entries(log)) == 5


def test_a_last_line_whose_newline_is_gone_is_kept(log: Path):
    path = log / audit.LOG
    path.write_text(path.read_text(encoding="utf-8").rstrip("\n"), encoding="utf-8")
    audit.append(log, "someone", "approve", version="v9")
    assert [e["version"] for e in audit.entries(log)] == ["v0", "v1", "v2", "v3", "v9"] and audit.problems(log) == []
