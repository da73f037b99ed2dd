"""Splits: no patient and no near duplicate stands on two sides."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture
from PIL import Image

from smearline import dataset, duplicates, images, settings, splits
from smearline.errors import DataError


def thumbnail(data: bytes) -> bytes:
    return images.thumbnail(images.decode(data)).tobytes()


def reexported(data: bytes, quality: int = 60, shift: int = 0, resize: float = 1.0) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((shift, shift, image.width, image.height))
    image = image.resize((round(image.width * resize), round(image.height * resize)))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def cells(count: int = 300, patients: int = 30) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sha256": [f"{i:064x}" for i in range(count)],
            "site": ["a" if i % 2 else "b" for i in range(count)],
            "patient": [f"p{i % patients}" if i % 2 else None for i in range(count)],
            "smear": None,
            "thumbnail": [np.random.default_rng(i).integers(0, 256, 256, np.uint8).tobytes() for i in range(count)],
        }
    )


@pytest.mark.parametrize(
    "change", [{"quality": 50}, {"shift": 1}, {"resize": 0.93}, {"quality": 70, "shift": 1, "resize": 1.05}]
)
def test_a_reexported_picture_is_found_and_another_cell_is_not(change: dict):
    originals = [picture(seed, size=180) for seed in range(40)]
    thumbnails = [thumbnail(p) for p in [*originals, reexported(originals[7], **change)]]
    assert duplicates.pairs(thumbnails).tolist() == [[7, 40]]


def test_the_search_finds_what_comparing_all_with_all_finds():
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (60, 256)).astype(float)
    noisy = np.clip(base + random.normal(0, 1, base.shape) * random.uniform(1, 40, (60, 1)), 0, 255)
    thumbnails = [row.astype(np.uint8).tobytes() for row in np.concatenate([base, noisy])]
    vectors = duplicates.unit_vectors(thumbnails)
    expected = np.argwhere(np.triu(vectors @ vectors.T >= 0.975, k=1))
    found = duplicates.pairs(thumbnails)
    assert 10 < len(expected) < 60
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_no_patient_straddles_and_the_shares_are_as_asked():
    frame = cells(4000, 400)
    found = splits.assign(frame, seed=1, val=0.15, test=0.2)
    with_patient = frame.assign(split=found["split"]).dropna(subset=["patient"])
    assert (with_patient.groupby("patient")["split"].nunique() == 1).all()
    shares = found["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.04)
    assert shares["val"] == pytest.approx(0.15, abs=0.04)
    other = splits.assign(frame, seed=2, val=0.15, test=0.2)
    assert (found["split"] != other["split"]).mean() > 0.2


@pytest.mark.mission("five folds test every patient once")
def test_in_all_folds_together_each_group_is_tested_once():
    frame = cells(1000, 100)
    folds = [splits.assign(frame, seed=1, val=0.15, test=0.2, fold=k) for k in range(5)]
    tested = np.stack([found["split"] == "test" for found in folds])
    assert (tested.sum(axis=0) == 1).all() and tested.any(axis=1).all()
    assert folds[0].equals(splits.assign(frame, seed=1, val=0.15, test=0.2))
    for test, fold in ((0.2, 5), (0.15, 1), (0.3, 1), (0.0, 1)):
        with pytest.raises(ValueError, match=f"fold {fold}: folds are 0 to K - 1"):
            settings.SplitSettings(seed=1, val=0.1, test=test, fold=fold, near_duplicate_correlation=0.9)
    assert settings.SplitSettings(seed=1, val=0.1, test=0.25, fold=3, near_duplicate_correlation=0.9).fold == 3


def test_near_duplicates_draw_their_patients_together():
    frame = cells()
    first, second = frame.index[frame["patient"] == "p1"][0], frame.index[frame["patient"] == "p3"][0]
    frame.loc[second, "thumbnail"] = frame.loc[first, "thumbnail"]
    for seed in range(20):
        found = splits.assign(frame, seed=seed, val=0.3, test=0.3)
        assert found["near_duplicate"].sum() == 2
        both = found[frame["patient"].isin(["p1", "p3"])]
        assert both["split"].nunique() == 1
        assert both["group"].nunique() == 1


def test_a_group_keeps_its_place_when_other_cells_are_added():
    frame = cells(600, 60)
    before = splits.assign(frame.iloc[:300], seed=3, val=0.15, test=0.2).set_index("sha256")["split"]
    after = splits.assign(frame, seed=3, val=0.15, test=0.2).set_index("sha256")["split"]
    assert (after.loc[before.index] == before).all()


def test_a_site_held_out_is_tested_as_a_whole_with_its_near_duplicates():
    frame = cells()
    in_a, in_b = frame.index[frame["site"] == "a"][0], frame.index[frame["site"] == "b"][0]
    frame.loc[in_a, "thumbnail"] = frame.loc[in_b, "thumbnail"]
    found = splits.assign(frame, seed=1, val=0.1, test=0.1, train_sites=["a"])
    assert set(found.loc[frame["site"] == "b", "split"]) == {"test"}
    assert found.loc[in_a, "split"] == "test"
    assert "train" in set(found["split"])
    same = splits.assign(frame, seed=1, val=0.1, test=0.1, test_only_sites=["b"])
    assert same["split"].equals(found["split"])


def test_impossible_splits_are_refused():
    with pytest.raises(DataError, match="not in the data; there are"):
        splits.assign(cells(), seed=1, val=0.1, test=0.1, train_sites=["c"])
    with pytest.raises(DataError, match="no image is left to train on"):
        splits.assign(cells(), seed=1, val=0.1, test=0.1, test_only_sites=["a", "b"])


def test_an_added_day_is_compared_with_all_and_what_was_found_before_is_kept(tmp_path: Path, monkeypatch):
    frame = cells(3000)
    for new, old in ((40, 2), (2500, 30), (2600, 2700)):
        frame.at[new, "thumbnail"] = frame.at[old, "thumbnail"]
    file = tmp_path / "local" / "near.npz"

    def found(rows: pd.DataFrame) -> list[list[int]]:
        return duplicates.kept_pairs(file, rows["sha256"], rows["thumbnail"]).tolist()

    assert found(frame[:2000]) == [[2, 40]]
    compared: list[int] = []
    real = duplicates._near

    def counted(points, new, *rest):
        compared.append(int(new.sum()))
        return real(points, new, *rest)

    monkeypatch.setattr(duplicates, "_near", counted)
    assert found(frame) == duplicates.pairs(list(frame["thumbnail"])).tolist() == [[2, 40], [30, 2500], [2600, 2700]]
    assert compared == [1000, 3000]
    again = frame.drop([40]).sample(frac=0.9, random_state=1).reset_index(drop=True)
    assert found(again) == duplicates.pairs(list(again["thumbnail"])).tolist()
    assert compared[2:] == [len(again)]  # of the two searches only the one that keeps nothing compared
    duplicates.kept_pairs(file, frame["sha256"], frame["thumbnail"], 0.9)  # another threshold is another search
    assert compared[-1] == 3000


@pytest.mark.mission("no patient stands on two sides, though some cells of his smear do not name him")
def test_a_cell_without_a_patient_goes_with_its_smear():
    frame = cells(400, 20).assign(site="a")
    number = np.arange(400) % 20
    frame["smear"] = [f"s{n}" for n in number]
    named = np.arange(400) // 20 % 4 > 0  # of each smear a quarter name no patient
    frame["patient"] = [f"p{n}" if known and n < 15 else None for n, known in zip(number, named, strict=True)]
    split = splits.assign(frame, seed=7, val=0.15, test=0.2)["split"]
    assert (split.groupby(frame["smear"]).nunique() == 1).all() and split.nunique() == 3
    assert (splits.places(dataset.whose(frame), 3).groupby(frame["smear"]).nunique() == 1).all()
    assert dataset.whose(frame).nunique() == 20 and dataset.patients(frame).nunique() == 15

    seen = frame.iloc[[0, 19]]  # p0 of s0, who is not named there, and s19, which has no patient
    assert dataset.trained_on(frame, seen).tolist() == [n in (0, 19) for n in number]
    assert dataset.trained_on(frame.assign(smear=None), seen).sum() == 2, "nothing else says whose the others are"
    assert dataset.trained_on(frame, seen.drop(columns="smear")).sum() == 2, "as older packages have it"
    later = pd.DataFrame({"sha256": ["x", "y"], "site": "a", "smear": "later", "patient": ["p3", None]})
    assert dataset.trained_on(later, frame.iloc[[23]]).all(), "another smear of p3, whom one of its cells does not name"
