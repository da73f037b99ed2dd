"""The service as it runs: what it answers, what it refuses, what it keeps."""

import contextlib
import hashlib
import io
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import picture
from PIL import Image
from serving_fixtures import Running, diagnose, parts, token

from serving.cases import CaseStore
from smearline import dataset

pytest_plugins = ["serving_fixtures"]
BLOOD = {"WBC(10^9/L)": 4.2, "HGB": {"value": 9.1, "unit": "g/dL"}, "PLT": "----", "Ward temperature": 21}


def problem(reply: httpx.Response, status: int) -> str:
    """The detail of an error, which is always a problem of RFC 9457 and says 'research use only'."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    body = reply.json()
    assert body["status"] == status and body["title"] and body["intended_use"] == "research use only"
    return str(body["detail"])


def test_the_three_lines_that_are_printed_work(service: Running):
    """One after the other, as a user pastes them; the third reads back what the second made."""
    lines = [line for line in service.said.splitlines() if line.strip().startswith("curl")]
    assert len(lines) == 3
    cell, smear, case = (
        json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout)
        for line in lines
    )
    assert len(cell["cells"]) == 1 and len(smear["cells"]) == 6
    assert case["case_id"] == smear["case_id"] and case["answers"][0] == smear


def test_the_first_token_is_shown_and_only_its_hash_is_kept_for_the_service(service: Running):
    shown = re.search(r"smearline_\S+", service.said)
    assert shown and shown[0] not in (service.home / "tokens.yaml").read_text()
    assert (service.home / "token").stat().st_mode & 0o777 == 0o600 and service.home.stat().st_mode & 0o777 == 0o700


def test_a_bad_image_is_answered_for_itself(client: httpx.Client):
    good = [picture(1), picture(2), picture(3, kind="PNG")]
    data = [good[0], b"no image", good[1], good[1], good[0][: len(good[0]) // 2], b"", picture(4, size=20), good[2]]
    answer = client.post("/v1/recognise", data={"site": "sim_north"}, files=parts(*data)).json()
    assert [cell["image"] for cell in answer["cells"]] == [0, 2, 7]
    assert [cell["sha256"] for cell in answer["cells"]] == [hashlib.sha256(g).hexdigest() for g in good]
    reasons = {error["image"]: error["reason"] for error in answer["errors"]}
    assert reasons == {1: "unreadable", 3: "duplicate", 4: "truncated", 5: "empty", 6: "too_small"}
    for cell in answer["cells"]:
        assert sum(cell["probabilities"].values()) == pytest.approx(1, abs=1e-3)
        assert cell["probability"] == max(cell["probabilities"].values()) == cell["probabilities"][cell["type"]]
    assert answer["origin"] == "simulated" and answer["intended_use"] == "research use only"


@pytest.mark.mission("what a cell's name rests on is shown by the service")
def test_what_a_name_rests_on_is_a_picture(client: httpx.Client):
    cell = picture(1)
    named = client.post("/v1/recognise", data={"site": "sim_north"}, files=parts(cell)).json()["cells"][0]["type"]
    shown = client.post("/v1/occlusion", data={"site": "sim_north"}, files=parts(cell))
    assert shown.headers["content-type"] == "image/png" and shown.headers["smearline-type"] == named
    pixels = np.asarray(Image.open(io.BytesIO(shown.content)))
    assert pixels.shape[1] == 2 * pixels.shape[0], "the picture and its overlay"
    assert pixels[:, : len(pixels)].std() > 5, "the cell is on it"
    assert shown.headers["smearline-origin"] == "simulated" and shown.headers["smearline-use"] == "research use only"
    other = client.post("/v1/occlusion", data={"site": "sim_north", "type": "EOS"}, files=parts(cell))
    assert other.headers["smearline-type"] == "EOS"

    def refused(*images: bytes, **more: str) -> str:
        return problem(client.post("/v1/occlusion", data={"site": "sim_north", **more}, files=parts(*images)), 422)

    assert "one image at a time" in refused(cell, picture(2))
    assert "unreadable" in refused(b"no image")
    assert "knows no type 'eosinophil'" in refused(cell, type="eosinophil")


def test_a_smear_is_answered_with_differential_diagnosis_and_blood_count(client: httpx.Client):
    answer = diagnose(
        client, "M-1", *(picture(i) for i in range(12)), cbc=BLOOD, acquired_at="2026-03-01T23:30:00-05:00"
    ).json()
    assert answer["differential"]["num_cells"] == 12
    counted = [t for t in answer["differential"]["types"].values() if t["share"]]
    assert all(t["low"] < t["share"] <= t["high"] for t in counted)
    diagnosis = answer["diagnosis"]
    assert sum(diagnosis["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert diagnosis["reasons"] if diagnosis["status"] == "diagnosed" else diagnosis["abstained_because"]
    assert {"group": "MDS", "because": "not trained on real patients"} in diagnosis["not_available"]
    assert answer["cbc"] == {"given": 4, "read": 2, "kept_but_not_read": 1, "missing": {"PLT": "not_determined"}}
    assert answer["acquired_at"] == "2026-03-02T04:30:00.000000+00:00"


def test_too_few_cells_and_no_cells_at_all_are_abstentions(client: httpx.Client):
    few = diagnose(client, "M-2", picture(1)).json()["diagnosis"]
    assert few["status"] == "abstained" and few["group"] is None
    none = diagnose(client, "M-3", b"broken").json()
    assert none["diagnosis"]["status"] == "abstained" and none["differential"] is None and none["cells"] == []


def test_a_blood_count_may_come_as_an_analysers_file_of_this_smear_only(client: httpx.Client):
    def send(smear: str, cbc: str, **more: str) -> httpx.Response:
        request = {"site": "sim_north", "smear": smear, **more}
        files = [*parts(picture(9)), ("cbc", ("x.csv", cbc.encode()))]
        return client.post("/v1/diagnose", data={"request": json.dumps(request)}, files=files)

    export = "Sample No.,Patient ID,WBC(10^3/uL),HGB(g/dL)\nX-1,P1,4.2,----\nX-2,P2,7.0,12\n"
    assert send("X-1", export).json()["cbc"] == {
        "given": 2,
        "read": 1,
        "kept_but_not_read": 0,
        "missing": {"HGB": "not_determined"},
    }
    assert "no sample of this smear" in problem(send("X-9", export), 422)
    assert "another patient" in problem(send("X-2", export, patient="P1"), 422)
    assert "column" in problem(send("X-3", "a,b\n1,2\n"), 422)


def test_identifiers_and_file_names_are_nowhere_in_what_is_kept(client: httpx.Client, service: Running):
    files = [("images", ("DOE_JOHN.jpg", picture(31)))]
    request = {"site": "lab", "smear": "ACC-4711", "patient": "DOE"}
    answer = client.post("/v1/diagnose", data={"request": json.dumps(request)}, files=files).json()
    assert answer["smear"] and answer["smear"] != "ACC-4711"
    kept = [path for path in service.home.rglob("*") if path.is_file() and "examples" not in path.parts]
    assert any(path.name.startswith("cases.sqlite") for path in kept)
    for path in kept:
        data = path.read_bytes()
        assert not any(name in data for name in (b"DOE_JOHN", b"ACC-4711", b"DOE")), path


def test_the_same_request_with_the_same_key_gets_the_same_bytes(client: httpx.Client, service: Running):
    first = diagnose(client, "I-1", picture(1), key="k1")
    again = diagnose(client, "I-1", picture(1), key="k1")
    assert again.content == first.content and again.status_code == 200
    assert len(client.get(f"/v1/smears/{first.json()['case_id']}").json()["answers"]) == 1
    assert "another request" in problem(diagnose(client, "I-1", picture(2), key="k1"), 422)
    with service.client(token(service, "other", ["diagnose"])) as other:  # a key belongs to its holder
        assert diagnose(other, "I-1", picture(1), key="k1").json()["answer_id"] != first.json()["answer_id"]


def test_of_two_at_once_one_does_the_work(service: Running):
    def send(_: int) -> bytes:
        with service.client() as client:
            return diagnose(client, "I-2", *(picture(i) for i in range(5)), key="k2").content

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(send, range(6)))) == 1
    assert len(list((service.home / "incoming").rglob(f"*-{json.loads(send(0))['answer_id']}-*"))) == 1


def test_a_smear_has_one_patient(client: httpx.Client):
    assert diagnose(client, "P-1", picture(1)).status_code == 200
    assert diagnose(client, "P-1", picture(2), patient="one").status_code == 200  # now it is known
    assert "another patient" in problem(diagnose(client, "P-1", picture(3), patient="two"), 409)


def test_no_token_a_wrong_one_and_one_for_something_else(client: httpx.Client, service: Running):
    with httpx.Client(base_url=client.base_url) as nobody:
        reply = nobody.get("/v1/model")
        assert "bearer token" in problem(reply, 401) and reply.headers["www-authenticate"] == "Bearer"
    with service.client("smearline_wrong") as wrong:
        problem(wrong.get("/v1/model"), 401)
    with service.client(token(service, "north only", ["recognise"], ["sim_north"])) as north:
        assert north.post("/v1/recognise", data={"site": "sim_north"}, files=parts(picture(1))).status_code == 200
        assert "site 'lab'" in problem(north.post("/v1/recognise", data={"site": "lab"}, files=parts(picture(1))), 403)
        assert "no role diagnose" in problem(diagnose(north, "T-1", picture(1)), 403)
        case_id = diagnose(client, "T-2", picture(1)).json()["case_id"]
        problem(north.get(f"/v1/smears/{case_id}"), 403)
    with service.client(token(service, "lab only", ["review"], ["lab"])) as lab:
        problem(lab.get(f"/v1/smears/{case_id}"), 403)
        problem(lab.post("/v1/review", json={"case_id": case_id, "sign_off": True}), 403)


def test_a_site_in_clinical_use_refuses_a_simulated_model(client: httpx.Client):
    reply = client.post("/v1/recognise", data={"site": "hospital"}, files=parts(picture(1)))
    assert "clinical use" in problem(reply, 409)


def test_what_is_wrong_with_a_request_is_said(client: httpx.Client):
    def send(**more: object) -> httpx.Response:
        return client.post("/v1/recognise", **{"data": {"site": "sim_north"}, "files": parts(picture(1)), **more})

    assert "multipart" in problem(client.post("/v1/recognise", json={"site": "sim_north"}), 415)
    assert "sim_north" in problem(send(data={"site": "sim_nord"}), 422)
    assert "unknown part 'colour'" in problem(send(data={"site": "sim_north", "colour": "blue"}), 422)
    assert "unknown part 'cbc'" in problem(send(data={"site": "sim_north", "cbc": "HGB"}), 422), (
        "a diagnosis alone reads it"
    )
    assert "at least one part" in problem(send(data={}, files=[("site", (None, "sim_north"))]), 422)
    assert "no JSON" in problem(client.post("/v1/diagnose", data={"request": "{"}, files=parts(picture(1))), 400)
    assert "acquired_at" in problem(diagnose(client, "W", picture(1), acquired_at="yesterday"), 422)
    assert "neither a number" in problem(diagnose(client, "W", picture(1), cbc={"WBC": [1]}), 422)
    problem(client.get("/v1/smears/none"), 404)
    assert client.get("/v1/recognise").status_code == 405


def test_too_much_is_refused_before_it_is_read(client: httpx.Client, service: Running):
    many = parts(*(b"%d" % i for i in range(513)))
    assert "at most 512" in problem(client.post("/v1/recognise", data={"site": "sim_north"}, files=many), 413)
    large = parts(b"x" * 8_000_001)
    assert "at most 8000000" in problem(client.post("/v1/recognise", data={"site": "sim_north"}, files=large), 413)

    sent = 0

    def endless():
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
        while sent < 400_000_000:
            sent += 1_000_000
            yield b"x" * 1_000_000

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.TransportError):  # the service may close the connection in mid-sentence
        problem(client.post("/v1/recognise", content=endless(), headers=headers), 413)
    assert sent < 200_000_000


def test_a_reviewer_overrides_and_signs_off(client: httpx.Client, service: Running):
    answer = diagnose(client, "R-1", *(picture(60 + i) for i in range(6)), cbc=BLOOD, patient="R").json()
    case_id, first, second = answer["case_id"], answer["cells"][0], answer["cells"][1]
    store = CaseStore(home=service.home)
    other = "BLAST"  # to which Auer rods apply
    review = {
        "case_id": case_id,
        "answer_id": answer["answer_id"],
        "cells": [{"sha256": first["sha256"], "type": other, "characteristics": {"auer_rod": "present"}}],
        "diagnosis": "AML",
        "comment": "clear",
        "sign_off": True,
    }
    with service.client(token(service, "dr. reviewer", ["review"])) as reviewer:
        said = reviewer.post("/v1/review", json=review, headers={"Idempotency-Key": "r"})
        assert reviewer.post("/v1/review", json=review, headers={"Idempotency-Key": "r"}).content == said.content
        for wrong, why in (
            ({"cells": [{"sha256": "0" * 64, "type": "BLAST"}]}, "no cell"),
            ({"cells": [{"sha256": first["sha256"], "type": "BLASTT"}]}, "nearest"),
            ({"cells": [{"sha256": first["sha256"], "characteristics": {"auer_rod": "many"}}]}, "no value"),
            ({"diagnosis": "flu"}, "not known"),
            ({}, "nothing is set"),
            (
                {"cells": [{"sha256": first["sha256"], "type": "LYMPH", "characteristics": {"auer_rod": "present"}}]},
                "apply",
            ),
            ({"cells": [{"sha256": first["sha256"], "type": t} for t in ("LYMPH", "MONO")]}, "twice"),
        ):
            assert why in problem(reviewer.post("/v1/review", json={"case_id": case_id, **wrong}), 422)
    assert said.json() | {"at": ""} == {
        "case_id": case_id, "reviewer": "dr. reviewer", "at": "", "comment": "clear", "overrides": 3, "signed_off": True,
        "origin": "simulated", "intended_use": "research use only",
    }  # fmt: skip
    case = client.get(f"/v1/smears/{case_id}").json()
    assert [row["was"] for row in case["overrides"] if row["name"] == "type"] == [first["type"]]
    assert case["signoffs"][0]["reviewer"] == "dr. reviewer"

    signed = next(c for c in store.signed_off() if c.case_id == case_id)
    cells = {cell.sha256: cell for cell in signed.cells}
    assert (cells[first["sha256"]].type, dict(cells[first["sha256"]].characteristics)) == (
        other,
        {"auer_rod": "present"},
    )
    assert cells[first["sha256"]].overridden and not cells[second["sha256"]].overridden
    assert (cells[second["sha256"]].type, dict(cells[second["sha256"]].characteristics)) == (second["type"], {})
    assert signed.diagnosis == "AML" and signed.patient == answer["patient"] and len(signed.counts) == 4
    images = pd.concat([pq.read_table(path, schema=dataset.CELLS).to_pandas() for path in signed.shards])
    assert set(images["sha256"]) == set(cells) and set(images["smear"]) == {answer["smear"]}
    store.mark_ingested([signed], "v2")
    assert case_id not in {c.case_id for c in store.signed_off()}


def test_a_sign_off_confirms_nothing_that_its_reviewer_has_not_seen(client: httpx.Client, service: Running):
    first = diagnose(client, "R-2", picture(70), picture(71)).json()
    second = diagnose(client, "R-2", picture(72)).json()
    review = {"case_id": first["case_id"], "sign_off": True}
    with service.client(token(service, "dr. late", ["review"])) as reviewer:
        assert "came after it" in problem(
            reviewer.post("/v1/review", json={**review, "answer_id": first["answer_id"]}), 409
        )
        assert second["answer_id"] in problem(reviewer.post("/v1/review", json=review), 409)
        reviewer.post("/v1/review", json={**review, "answer_id": second["answer_id"]}).raise_for_status()
    diagnose(client, "R-2", picture(73)).raise_for_status()
    signed = next(c for c in CaseStore(home=service.home).signed_off() if c.case_id == first["case_id"])
    assert len(signed.cells) == 3, "what came after the sign-off is not signed"


@pytest.mark.parametrize("at", ["2999-01-01T00:00:00Z", "12", "0001-01-01T00:00:00+10:00", "2026-01-01T00:00:00"])
def test_a_scanner_whose_clock_is_wrong_is_refused(client: httpx.Client, at: str):
    assert "acquired_at" in problem(diagnose(client, "C-1", picture(5), acquired_at=at), 422)


def test_names_are_the_same_with_and_without_spaces(client: httpx.Client):
    spaced, plain = (diagnose(client, s, picture(5), patient=p).json() for s, p in ((" W-1 ", "P "), ("W-1", "P")))
    assert (spaced["case_id"], spaced["patient"]) == (plain["case_id"], plain["patient"])
    problem(diagnose(client, " ", picture(5)), 422)


def test_a_blood_count_of_two_patients_is_refused(client: httpx.Client):
    files = [("images", ("1", picture(5))), ("cbc", ("c", b"smear,patient,WBC(10^9/L)\nt,A,400\nt,B,4\n"))]
    reply = client.post("/v1/diagnose", data={"request": json.dumps({"site": "sim_north", "smear": "t"})}, files=files)
    problem(reply, 422)


@pytest.mark.parametrize(
    "body",
    ["[" * 100_000, '{"site": "sim_north", "smear": "a", "smear": "b"}', '{"site": NaN}', '{"cbc": {"\\ud800": 1}}'],
)
def test_json_that_cannot_be_used_is_refused(client: httpx.Client, body: str):
    problem(client.post("/v1/diagnose", data={"request": body}, files=[("images", ("1", picture(5)))]), 400)


def test_a_picture_that_would_hold_others_up_is_refused(client: httpx.Client):
    out = io.BytesIO()
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(out, "PNG")
    gif = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(gif, "GIF")
    bomb = picture(1, kind="BMP")
    bomb = bomb[:18] + 2 * (15_000).to_bytes(4, "little") + bomb[26:]  # of which Pillow refuses the header
    answer = diagnose(client, "B-1", picture(5), out.getvalue(), gif.getvalue(), bomb).json()
    assert [e["reason"] for e in answer["errors"]] == ["too_large", "unreadable", "too_large"]
    assert len(answer["cells"]) == 1


def test_the_inference_log_holds_what_was_answered_by_the_day_of_acquisition(client: httpx.Client, service: Running):
    days = ("2026-04-01", "2026-04-02")
    answers = [
        diagnose(client, f"L-{d}", picture(i), picture(9), acquired_at=f"{d}T10:00:00Z").json()
        for i, d in enumerate(days)
    ]
    store = CaseStore(home=service.home)
    store.export_log()
    for day, answer in zip(days, answers, strict=True):
        log = pd.read_parquet(service.home / "log" / "sim_north" / f"{day}.parquet")
        assert set(log["answer_id"]) == {answer["answer_id"]} and set(log["day"]) == {day} and len(log) == 2
        assert log["predicted_type"].tolist() == [cell["type"] for cell in answer["cells"]]
        assert {"p_BLAST", "stain_glass_R", "optics_noise", "scale_assumed", "version", "received_at"} <= set(log)
        assert len(log["embedding"].iloc[0]) == 8 and log["embedding"].iloc[0].dtype == "float32"
    assert store.export_log() == []
    diagnose(client, "L-3", picture(3), acquired_at="2026-04-02T11:00:00Z")
    assert [path.name for path in store.export_log()] == ["2026-04-02.parquet"]


def test_the_model_says_where_it_comes_from(client: httpx.Client, service: Running):
    model = client.get("/v1/model").json()
    assert model["origin"] == "simulated" and model["commit"] == "c" and model["limits"]["images"] == 512
    assert model["cards"]["diagnosis"]["groups"] == ["AML", "HEALTHY"]


def test_health_metrics_and_a_description_without_a_network(client: httpx.Client):
    for path in ("/healthz", "/livez", "/readyz"):
        assert client.get(path).status_code == 200
    client.post("/v1/recognise", data={"site": "sim_north"}, files=parts(b"broken"))
    for path in ("/v1/smears/0123456789abcdef01234567", "/v1/no-such", "/no-such"):
        assert client.get(path).status_code == 404
    metrics = client.get("/metrics").text
    assert 'smearline_images_refused_total{reason="unreadable"}' in metrics
    assert "smearline_diagnoses_total" in metrics
    assert 'smearline_request_seconds_count{route="/v1/recognise",status="200"}' in metrics
    assert 'smearline_request_seconds_count{route="/v1/smears/{case_id}",status="404"}' in metrics
    assert "0123456789abcdef01234567" not in metrics and "no-such" not in metrics
    assert "/v1/diagnose" in client.get("/openapi.json").json()["paths"]
    assert "http" not in client.get("/").text
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_no_process_of_the_service_has_torch(service: Running):
    workers = service.workers()
    assert len(workers) == 3  # BentoML's own, the public service, the recogniser
    for worker in workers:
        mapped = {part for file in worker.memory_maps() for part in file.path.split("/")}
        assert "onnxruntime" in mapped or worker.pid == min(w.pid for w in workers)
        assert "torch" not in mapped
