"""The small workspace of `tiny`, made once and copied for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import copied, make

from flows.workspace import Workspace
from smearline import tokens


@pytest.fixture(scope="session")
def prefect() -> Iterator[None]:
    """A Prefect of its own, with no server that was there before."""
    from prefect.settings import PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with (
        temporary_settings({PREFECT_SERVER_ANALYTICS_ENABLED: False}),
        prefect_test_harness(server_startup_timeout=120),
    ):
        yield


@pytest.fixture(scope="session")
def made(prefect: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the workspace and its remote; its first candidate, v1.0.0, is registered."""
    from flows.retrain import retrain

    folder = tmp_path_factory.mktemp("made")
    state = retrain(str(make(folder / "workspace").folder), return_state=True)
    assert state.is_completed(), state.message
    return folder


@pytest.fixture
def space(made: Path, tmp_path: Path, sites_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of that workspace for one test."""
    return copied(made, tmp_path, monkeypatch)


@pytest.fixture
def token(space: Workspace, monkeypatch: pytest.MonkeyPatch) -> str:
    """That of a haematologist who may approve, and the one in use."""
    made = tokens.create(space.service / "tokens.yaml", "haematologist", ["review", "approve"])
    monkeypatch.setenv("SMEARLINE_TOKEN", made)
    return made
