"""Cells become smears, and what differs by patient is kept apart from what differs by picture."""

import numpy as np
import pandas as pd
import pytest
from drawn import WARD, draw, lab

from monitoring.reference import refer
from monitoring.smears import Centres, by_smear, named
from smearline.errors import DataError


def test_cells_without_a_smear_are_cut_into_pseudo_smears():
    cells = named(draw(6, 3).assign(smear=None, acquired_at=pd.NaT))
    rows = by_smear(cells, None)
    assert rows["pseudo"].all()
    assert list(rows["num_cells"]) == [50, 50, 50, 50, 40]  # 240 cells
    # Stored by label, they would give smears of one type each.
    sorted_by_label = named(draw(6, 3).assign(smear=None, acquired_at=pd.NaT).sort_values("predicted_type"))
    pd.testing.assert_frame_equal(by_smear(sorted_by_label, None), rows)


def test_pseudo_smears_keep_to_their_day_and_to_what_training_saw():
    cells = draw(4, 3, per_day=2).assign(smear=None)
    cells.loc[:39, "split"] = "train"
    rows = by_smear(named(cells), None)
    assert rows.groupby(["day", "seen"])["num_cells"].sum().to_dict() == {
        ("2024-03-04", False): 40,
        ("2024-03-04", True): 40,
        ("2024-03-05", False): 80,
    }


def test_a_cell_that_was_sent_twice_counts_once():
    cells = draw(1, 3)
    assert by_smear(named(pd.concat([cells, cells])), None)["num_cells"].tolist() == [40]


def test_a_smear_with_few_cells_is_left_out():
    assert by_smear(named(draw(3, 3, cells=19)), None).empty


def test_nuclei_are_measured_on_neutrophils_alone():
    cells = named(draw(1, 3))
    cells.loc[cells["predicted_type"] != "NEUT_SEG", "stain_nucleus_R"] = 9.0
    assert by_smear(cells, None)["stain_nucleus_R"][0] < 1
    cells["predicted_type"] = "LYMPH"
    row = by_smear(cells, None).iloc[0]
    assert np.isnan(row["stain_nucleus_R"]) and row["stain_red_cell_R"] > 0


def test_the_odd_crop_that_still_shows_a_red_cell_is_no_witness():
    cells = named(draw(1, 3))
    cells.loc[4:, [c for c in cells if "red_cell" in c]] = np.nan
    row = by_smear(cells, None).iloc[0]
    assert np.isnan(row["stain_red_cell_G"]) and row["stain_red_cell_seen"] == 0.1


def test_a_smear_is_of_the_last_day_on_which_its_cells_came():
    cells = draw(1, 3)
    cells.loc[:9, "acquired_at"] -= pd.Timedelta(days=1)
    assert by_smear(named(cells), None)["day"].tolist() == ["2024-03-04"]


def test_another_mix_of_types_moves_neither_confidence_nor_embedding():
    centres = Centres.of(draw(24, 1))
    usual, ward, shifted = (
        by_smear(named(c), centres).mean(numeric_only=True)
        for c in (draw(12, 5), draw(12, 5, mix=WARD), draw(12, 5, embedding=0.3))
    )
    assert ward["share_BLAST"] > usual["share_BLAST"] + 0.4
    assert ward["confidence_mean"] == pytest.approx(
        usual["confidence_mean"], abs=0.01
    )  # blasts are named 0.2 less surely
    assert ward["embedding_distance"] < 0.25 < shifted["embedding_distance"]


def test_the_mix_is_that_of_the_networks_own_answers_where_they_are_known():
    """A site's offsets move the types that are served; a log of before has no own answers and is read as it is."""
    cells = draw(4, 5)
    moved = cells.assign(predicted_type="BLAST", type_untempered=cells["predicted_type"])
    moved.loc[:9, ["predicted_type", "type_untempered"]] = [cells["predicted_type"].iloc[0], None]
    cells.loc[:9, "predicted_type"] = cells["predicted_type"].iloc[0]
    ours, usual = by_smear(named(moved), None), by_smear(named(cells), None)
    served = [c for c in usual if c.startswith("served_")]
    pd.testing.assert_frame_equal(ours.drop(columns=served), usual.drop(columns=served), check_dtype=False)
    assert ours["served_BLAST"].iloc[-1] == 1 > usual["served_BLAST"].iloc[-1], "what was answered stays what it was"


def test_the_distance_does_not_grow_as_cells_become_fewer():
    centres = Centres.of(draw(24, 1))
    few, many = (by_smear(named(draw(60, 6, cells=n)), centres)["embedding_distance"].mean() for n in (20, 160))
    assert few < 0.2 and many < 0.2


def test_embeddings_of_another_length_are_refused():
    cells = draw(1, 2).assign(embedding=lambda c: [np.zeros(5)] * len(c))
    with pytest.raises(DataError, match="5 numbers"):
        by_smear(named(cells), Centres.of(draw(4, 1)))


def test_the_reference_measures_confidence_on_what_training_did_not_see():
    cells = draw(20, 1)
    cells.loc[cells["smear"].isin([f"s1-{i}" for i in range(12)]), "split"] = "train"
    found = refer(cells, version="v1", embedding_version="e1", origin="simulated")
    about = found.about["sites"]["lab"]
    assert (about["num_smears"], about["num_smears_not_trained_on"]) == (20, 8)
    assert found.smears.groupby("seen")["confidence_mean"].count().to_dict() == {False: 8, True: 0}
    assert found.centres["lab"].count_T.sum() == 8 * 40


def test_a_reference_is_read_as_it_was_written(tmp_path):
    reference = lab()
    reference.save(tmp_path)
    again = type(reference).load(tmp_path)
    pd.testing.assert_frame_equal(again.smears, reference.smears)
    np.testing.assert_allclose(again.centres["lab"].sum_TF, reference.centres["lab"].sum_TF)
