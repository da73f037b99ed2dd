"""The README's figures are those of bench/results, and of nothing else."""

from conftest import CHECKOUT

from bench import figures


def test_the_readme_shows_what_the_results_say():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert figures.written(readme) == readme, "the README's tables differ from bench/results: run `make figures`"


def test_every_result_names_its_commit_data_and_command():
    import json

    for path in figures.RESULTS.glob("*.json"):
        where = json.loads(path.read_text(encoding="utf-8"))["provenance"]
        assert len(where["commit"]) == 40, path.name
        assert where["command"], path.name
        assert where["date"], path.name
