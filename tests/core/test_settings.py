from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT, put

from smearline import settings
from smearline.errors import SettingsError


def written(tmp_path: Path, **overlay) -> Path:
    base = yaml.safe_load((CHECKOUT / "params.yaml").read_text(encoding="utf-8"))
    return put(tmp_path / "params.yaml", yaml.safe_dump(settings.overlaid(base, overlay)))


def test_an_unknown_key_names_the_nearest(tmp_path: Path):
    with pytest.raises(
        SettingsError, match=r"unknown key train.learning_rte; nearest: .*'warmup'|unknown key train.learning_rte"
    ):
        settings.load(written(tmp_path, train={"learning_rte": 1}))
    with pytest.raises(SettingsError, match=r"unknown key train\.epoch; nearest: 'epochs'"):
        settings.load(written(tmp_path, train={"epoch": 1}))
    with pytest.raises(SettingsError, match=r"unknown key trian; nearest: 'train'"):
        settings.load(written(tmp_path, trian={}))


def test_a_value_out_of_range_is_named_with_what_was_given(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"train\.lr: .*greater than 0.*given: -1"):
        settings.load(written(tmp_path, train={"lr": -1}))
    with pytest.raises(SettingsError, match="not a multiple of workers"):
        settings.load(written(tmp_path, train={"batch_size": 9, "workers": 2}))


def test_what_is_no_set_of_parameters_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match="holds a list"):
        settings.load(put(tmp_path / "params.yaml", "- 1\n"))
    with pytest.raises(SettingsError, match="no valid YAML"):
        settings.load(put(tmp_path / "params.yaml", "a: [\n"))
    with pytest.raises(SettingsError, match="leave nothing to train on"):
        settings.load(written(tmp_path, split={"val": 0.5, "test": 0.5}))


def test_the_overlay_of_tuning_lies_over_the_file(tmp_path: Path):
    overlay = put(tmp_path / "overlay.yaml", "train: {lr: 0.5}\n")
    found = settings.load(written(tmp_path), overlay)
    assert found.train.lr == 0.5
    assert found.train.epochs == settings.load(written(tmp_path)).train.epochs


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        settings.load(CHECKOUT / "params.yaml").train.lr = 1  # type: ignore[misc]


@pytest.mark.parametrize("recipe", sorted((CHECKOUT / "pipelines" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_fits_the_parameters(recipe: Path):
    settings.load(CHECKOUT / "params.yaml", recipe)
