"""The reader gives the pictures that were asked for, in an order that hangs on nothing but seed and epoch, group by group."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import picture

from smearline import dataset, images, reader
from smearline.errors import ImageError

NUM = 300


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """300 pictures in two shards, as the reader takes them."""
    folder = tmp_path_factory.mktemp("data") / "cells"
    for part in range(2):
        with dataset.CellWriter(folder, f"site{part}") as writer:
            for i in range(part * NUM // 2, (part + 1) * NUM // 2):
                row = {"sha256": f"{i:064}", "image": picture(i, 80, "PNG" if i % 50 == 0 else "JPEG"), "width": 80}
                writer.add(dict.fromkeys(dataset.CELLS.names) | row)
    frame = dataset.index(folder, ["sha256"])
    return frame.assign(scale=0.25).sort_values("sha256", ignore_index=True)


def weights(num: int, rare: slice = slice(0, 0), times: float = 1.0) -> np.ndarray:
    found = np.ones(num)
    found[rare] *= times
    return found / found.sum()


def test_the_crops_are_those_of_the_one_way_in_any_order(cells: pd.DataFrame):
    positions = np.random.default_rng(1).permutation(NUM)[:250]
    read = list(reader.Crops(cells, 20.0, 32, threads=3).batches(positions, 24))
    assert [len(b) for b in read] == [24] * 10 + [10]
    expected = [reader.prepare(picture(i, 80, "PNG" if i % 50 == 0 else "JPEG"), 0.25, 20.0, 32) for i in positions]
    np.testing.assert_array_equal(np.concatenate(read), np.stack(expected))


def test_it_goes_on_in_the_middle(cells: pd.DataFrame):
    crops, positions = reader.Crops(cells, 20.0, 32), np.arange(NUM)[::-1].copy()
    whole = list(crops.batches(positions, 32))
    rest = list(crops.batches(positions, 32, start=6))
    np.testing.assert_array_equal(np.concatenate(whole[6:]), np.concatenate(rest))
    assert list(crops.batches(positions, 32, start=99)) == []


def test_a_picture_that_cannot_be_read_is_an_error_and_not_a_black_square(tmp_path: Path):
    with dataset.CellWriter(tmp_path / "cells", "a") as writer:
        writer.add(dict.fromkeys(dataset.CELLS.names) | {"sha256": "x", "image": b"no picture", "width": 80})
    frame = dataset.index(tmp_path, ["sha256"]).assign(scale=0.25)
    with pytest.raises(ImageError):
        list(reader.Crops(frame, 20.0, 32).batches(np.zeros(8, np.int64), 8))


def test_each_row_group_is_fetched_once_an_epoch(cells: pd.DataFrame, monkeypatch: pytest.MonkeyPatch):
    crops = reader.Crops(cells, 20.0, 32)
    order = reader.epoch_order(crops.groups, weights(NUM), 296, seed=3, epoch=0)
    fetched, plain = [], reader.pq.ParquetFile.read_row_group

    def counted(file, group, **options):
        fetched.append((id(file), group))
        return plain(file, group, **options)

    monkeypatch.setattr(reader.pq.ParquetFile, "read_row_group", counted)
    assert sum(len(b) for b in crops.batches(order, 8)) == 296
    assert len(fetched) == len(set(fetched)) == len(set(crops.groups))


def test_an_epoch_is_the_same_for_any_number_of_ranks_and_each_has_its_own_part():
    groups = np.arange(6400) // 64
    order = reader.epoch_order(groups, weights(6400), 6400, seed=3, epoch=2).reshape(100, 64)
    assert sorted(order.ravel()) == list(range(6400))
    for ranks in (2, 4, 8):
        parts = [order[:, rank::ranks] for rank in range(ranks)]
        assert {p.shape for p in parts} == {(100, 64 // ranks)}, "equal steps"
        assert sorted(np.concatenate([p.ravel() for p in parts])) == list(range(6400))
        # A rank's lanes are its own: what it reads no other rank has to read as well (but where a lane ends).
        read = [set(groups[p[:, :].ravel()]) for p in parts]
        shared = sum(len(a & b) for i, a in enumerate(read) for b in read[i + 1 :])
        assert shared <= reader.LANES


def test_a_batch_is_of_many_groups_though_they_are_read_one_by_one():
    """Stored by class, as folders are imported: 6,400 images of 4 classes, one after the other."""
    groups, classes = np.arange(6400) // 64, np.arange(6400) // 1600
    order = reader.epoch_order(groups, weights(6400), 6400, seed=3, epoch=0).reshape(100, 64)
    assert np.mean([len(set(groups[batch])) for batch in order]) > 28
    shares = np.array([np.bincount(classes[batch], minlength=4) / 64 for batch in order])
    assert shares.std(axis=0).max() < 0.13, "0.054 where each image is drawn for itself"
    following = np.abs(np.diff(order.ravel()))
    assert (following < 64).mean() < 0.05, "neighbours in the shard are no neighbours in the epoch"


def test_what_is_drawn_often_comes_at_different_times():
    groups = np.arange(6400) // 64
    drawn = weights(6400, slice(0, 64), 20)
    order = reader.epoch_order(groups, drawn, 6400, seed=3, epoch=0)
    times = np.bincount(order, minlength=6400)
    assert np.abs(times - drawn * 6400).max() <= 1.0 and len(order) == 6400
    places = np.flatnonzero(order == 0)
    assert len(places) >= 16 and np.diff(places).max() < 3000 and np.ptp(places) > 3000


def test_scaled_decoding_is_near_to_the_whole_picture():
    data = picture(5, 320)
    scaled = reader.prepare(data, 0.1, 25.0, 64).astype(int)
    whole = images.crop(images.decode(data), 0.1, 25.0, 64).astype(int)
    assert scaled.shape == (64, 64, 3) and np.abs(scaled - whole).mean() < 4
    given = images.decode(data)
    np.testing.assert_array_equal(reader.prepare(data, 0.1, 25.0, 64, given), scaled)
