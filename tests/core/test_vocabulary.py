import pytest

from smearline import sources, vocabulary
from smearline.errors import ImportSourceError, VocabularyError


def test_fourteen_types_and_twenty_four_characteristics():
    words = vocabulary.load()
    assert len(words.differential_types) == 14
    assert len(words.characteristics) == 24
    assert sum(c.origin == "wbcatt" for c in words.characteristics.values()) == 11
    assert words.children("NEUT") == ("NEUT_SEG", "NEUT_BAND")
    for cell_type in words.types.values():
        assert set(cell_type.neighbours) <= set(words.types)
    for characteristic in words.characteristics.values():
        assert set(characteristic.applies_to) <= set(words.types)


def test_tolerance_goes_both_ways():
    types = vocabulary.load().types
    for code, cell_type in types.items():
        for neighbour in cell_type.neighbours:
            assert code in types[neighbour].neighbours, f"{neighbour} tolerates {code} or neither does"


@pytest.mark.parametrize(
    ("name", "code"), [("Segmented Neutrophils", "NEUT_SEG"), ("blast", "BLAST"), ("IG", "IG"), ("MYB", "MYELO")]
)
def test_names_that_laboratories_use(name: str, code: str):
    assert vocabulary.load().type_code(name) == code


def test_what_is_not_known_is_refused_with_the_nearest():
    with pytest.raises(VocabularyError, match=r"'eosinophill'.*'eosinophil'"):
        vocabulary.load().type_code("eosinophill")
    with pytest.raises(VocabularyError, match="'auer_rod'"):
        vocabulary.load().characteristic_value("auer_rods", "present")


@pytest.mark.parametrize("name", sources.names())
def test_every_source_is_valid(name: str):
    source = sources.load(name)
    assert all(sources.at_end(pattern) for pattern in (source.pattern, *(table.file for table in source.tables)))


def test_an_unknown_source_names_the_known():
    with pytest.raises(ImportSourceError, match=r"no source 'pcb'.*nearest: 'pbc'"):
        sources.load("pcb")
