"""Dataclasses come back from JSON as they were, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pytest

from netdecouple.records import read


@dataclass(frozen=True)
class Inner:
    name: str
    is_big: bool


@dataclass(frozen=True)
class Outer:
    count: int
    share: float | None
    pair: tuple[int, str]
    inner: tuple[Inner, ...]
    maybe: Inner | None = None


OUTER = Outer(3, 0.5, (1, "x"), (Inner("a", True), Inner("b", False)), Inner("c", True))


def as_json(**values: object) -> object:
    return json.loads(json.dumps(asdict(OUTER) | values))


def test_comes_back_equal() -> None:
    assert read(Outer, as_json()) == OUTER
    assert read(Outer, as_json(share=None, maybe=None, inner=[])) == Outer(3, None, (1, "x"), ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra": 1}, "Outer has missing or unknown fields"),
        ({"maybe": {"name": "c"}}, "Inner has missing or unknown fields"),
        ({"count": True}, "'count' must be int, not True"),
        ({"count": 3.0}, "'count' must be int"),
        ({"count": None}, "'count' must be int"),
        ({"count": -1}, "not negative"),
        ({"share": float("inf")}, "finite"),
        ({"pair": [1]}, "'pair' must be a list of 2"),
        ({"pair": "1x"}, "'pair' must be a list"),
        ({"inner": [3]}, "Inner has missing or unknown fields"),
        ({"inner": [{"name": 1, "is_big": True}]}, "'name' must be str"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(Outer, as_json(**values))


def test_numbers_may_be_negative_where_that_makes_sense() -> None:
    assert read(Outer, as_json(count=-1), signed=True).count == -1
    with pytest.raises(ValueError, match="finite"):
        read(Outer, as_json(share=float("-inf")), signed=True)
