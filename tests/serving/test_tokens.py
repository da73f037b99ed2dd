"""Tokens: kept as hashes, checked in one place."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from smearline import tokens
from smearline.errors import TokenError


def test_a_token_is_shown_once_and_known_by_its_hash(tmp_path: Path):
    path = tmp_path / "service" / "tokens.yaml"
    token = tokens.create(path, "scanner", ["recognise", "diagnose"], ["lab"])
    assert token not in path.read_text() and path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700, "in it come cases and images"
    holder = tokens.holder(path, token)
    assert (holder.name, holder.roles) == ("scanner", {"recognise", "diagnose"})
    assert holder.at("lab") and not holder.at("elsewhere")
    assert tokens.holder(path, tokens.create(path, "dr", ["review"])).at("elsewhere")
    assert tokens.holder(path, token).name == "scanner"


@pytest.mark.parametrize("wrong", ["", "smearline_", "smearline_x", "\udcff"])
def test_any_other_token_is_nobodys(tmp_path: Path, wrong: str):
    tokens.create(tmp_path / "t.yaml", "a", ["review"])
    with pytest.raises(TokenError, match="not known"):
        tokens.holder(tmp_path / "t.yaml", wrong)


def test_a_token_taken_out_of_the_file_is_void_at_once(tmp_path: Path):
    path = tmp_path / "t.yaml"
    token = tokens.create(path, "a", ["review"])
    tokens.holder(path, token)
    path.write_text("{}")
    with pytest.raises(TokenError, match="not known"):
        tokens.holder(path, token)


def test_what_cannot_be_a_token_is_refused(tmp_path: Path):
    path = tmp_path / "t.yaml"
    with pytest.raises(TokenError, match="there is no"):
        tokens.holder(path, "x")
    with pytest.raises(TokenError, match="nearest: 'recognise'"):
        tokens.create(path, "a", ["recognize"])
    with pytest.raises(TokenError, match="needs a name"):
        tokens.create(path, "a", [])
    tokens.create(path, "a", ["review"])
    with pytest.raises(TokenError, match="already"):
        tokens.create(path, "a", ["review"])
    path.write_text(yaml.safe_dump({"a": {"token": "in the clear"}}))
    with pytest.raises(TokenError, match="no file of tokens"):
        tokens.holder(path, "x")


def test_tokens_made_side_by_side_are_all_kept(tmp_path: Path):
    path, names = tmp_path / "tokens.yaml", [f"scanner-{i}" for i in range(16)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda name: tokens.create(path, name, ["recognise"]), names))
    assert [tokens.holder(path, token).name for token in made] == names
