import pytest

from repblocks.errors import ConfigurationError
from repblocks.names import known_name


def test_a_known_name_is_itself() -> None:
    assert known_name("x", "cosine", ["step", "cosine"]) == "cosine"


def test_an_unknown_name_comes_with_near_ones_only() -> None:
    with pytest.raises(ConfigurationError) as caught:
        known_name("scheduler.name", "cosin", ["step", "cosine", "poly"])
    assert str(caught.value) == "scheduler.name=cosin is unknown; did you mean one of: cosine?"


def test_without_near_names_all_are_listed() -> None:
    with pytest.raises(ConfigurationError, match="poly, step"):
        known_name("scheduler.name", "zzz", ["step", "poly"])
