"""What a service keeps through a crash, and how it goes over to another version."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import picture, put
from serving_fixtures import Running, diagnose, make_workspace, start, stop, version_of, wait_for

from serving.cases import CaseStore

pytest_plugins = ["serving_fixtures"]


@pytest.fixture
def space(tmp_path: Path, bentos: Path, packages: tuple[Path, Path]) -> Path:
    return make_workspace(tmp_path / "space", bentos, packages[0])


@pytest.fixture
def started(sites: Path) -> Iterator[list[Running]]:
    """Services that the test starts; they are stopped whatever happens."""
    running: list[Running] = []
    yield running
    for one in running:
        if one.process.poll() is None:
            stop(one)


def test_kill_9_loses_no_answer_that_was_given(space: Path, sites: Path, started: list[Running]):
    running = start(space, sites)
    started.append(running)
    given: dict[str, bytes] = {}
    enough = threading.Event()

    def send(sender: int) -> None:
        with running.client() as client:
            for number in range(1000):
                key = f"{sender}-{number}"
                try:
                    reply = diagnose(client, key, picture(number), key=key)
                except httpx.TransportError:
                    return
                assert reply.status_code == 200
                given[key] = reply.content
                if len(given) > 12:
                    enough.set()

    senders = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    for sender in senders:
        sender.start()
    assert enough.wait(120)
    workers = running.workers()
    for worker in workers:  # all at once, in the midst of requests
        worker.kill()
    for sender in senders:
        sender.join()
    assert running.process.wait(30) == 1  # it ended by itself, and says so

    store = CaseStore(home=running.home)
    for body in given.values():
        kept = store.answer(json.loads(body)["answer_id"])
        assert kept["body"] == body
    fresh = start(space, sites)
    started.append(fresh)
    with fresh.client() as client:
        for key, body in list(given.items())[:5]:
            assert diagnose(client, key, picture(int(key.split("-")[1])), key=key).content == body


def test_it_goes_over_to_the_version_that_is_put_in_production_and_back(
    space: Path, sites: Path, packages: tuple[Path, Path], started: list[Running]
):
    one, two = (version_of(p) for p in packages)
    running = start(space, sites)
    started.append(running)

    def answers_with(version: str) -> bool:
        try:
            with running.client() as client:
                return bool(client.get("/v1/model").json()["version"] == version)
        except (httpx.TransportError, KeyError):
            return False

    assert answers_with(one)
    recogniser = next(w for w in running.workers() if "Recogniser" in w.cmdline())
    recogniser.kill()  # it comes again by itself; until then clients are told to come again
    with running.client() as client:
        seen = set()
        while 200 not in seen:
            reply = diagnose(client, "K", picture(1))
            seen.add(reply.status_code)
            assert reply.status_code == 200 or (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    switch = space / ".smearline" / "production"
    put(switch, two + "\n")
    wait_for(lambda: answers_with(two))
    with running.client() as client:
        said = diagnose(client, "V", picture(1)).json()
        assert said["version"] == two and said["diagnosis"] == {
            "status": "no diagnosis model", "group": None, "because": "too few patients",
        }  # fmt: skip
    put(switch, "0123456789ab")  # there is no such bento: the one before serves on
    assert running.process.stdout is not None
    assert any("does not start" in line for line in iter(running.process.stdout.readline, ""))
    wait_for(lambda: answers_with(two))
    workers = running.workers()
    stop(running)
    assert running.process.returncode == 0
    assert [w.cmdline() for w in workers if w.is_running() and w.status() != "zombie"] == []


def test_a_package_that_must_not_be_served_does_not_start(
    tmp_path: Path, bentos: Path, packages: tuple[Path, Path], sites: Path, capfd: pytest.CaptureFixture[str]
):
    """A real recogniser beside a diagnosis learned from simulated patients, smuggled past the stage `package`."""
    import shutil

    version = version_of(packages[0])
    store = tmp_path / "store"
    shutil.copytree(bentos, store, symlinks=True)
    card = store / "bentos" / "smearline" / version / "src" / "package" / "recogniser" / "model.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"origin": "real"}))
    space = make_workspace(tmp_path / "space", store, packages[0])
    os.environ["PYTHONUNBUFFERED"] = "1"
    with pytest.raises(AssertionError, match="serves only diagnoses learned from real patients"):
        start(space, sites)


def test_told_to_stop_twice_it_leaves_no_worker_behind(space: Path, sites: Path, started: list[Running]):
    """As make and a terminal do, which say it to the whole group."""
    running = start(space, sites)
    started.append(running)
    workers = running.workers()
    assert workers
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        running.process.send_signal(number)
        time.sleep(0.3)
    assert running.process.wait(60) == 0
    assert not [worker for worker in workers if worker.is_running()]
