"""Whatever the fuzzers found stays mended, and half a minute of fuzzing finds nothing new."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import CORPUS, FUZZERS, fuzz, make
from tests.fuzz.case import Case
from tests.fuzz.harness import Worker

pytest.importorskip("torch")  # one of the fuzzers is about saved modules
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.json")), ids=lambda path: path.stem)
def test_what_was_found_once_ends_well(worker: Worker, path: Path):
    """Refused in one line, or done right; nothing read or written that should not be."""
    assert worker.run(Case.from_json(path.read_text(encoding="utf-8"))) == ""


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_cases_are_the_same_every_time(fuzzer: str):
    """What fails can be told by its seed and number; as text it stays the same."""
    for number in range(6):
        made = make(fuzzer, 1, number)
        assert made == make(fuzzer, 1, number)
        assert Case.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("dies", "died: SIGSEGV"),
        ("raises", "KeyError"),
        ("grows", "memory:"),
        ("writes", "outside of the folder"),
        ("litters", "nobody asked for"),
    ],
)
def test_the_worker_notices(worker: Worker, command: str, problem: str):
    """Each thing that no case may do."""
    assert problem in worker.run(Case((f"test-{command}",)))


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_nothing_new_is_found(fuzzer: str, tmp_path: Path):
    """Ten seconds from a seed of the day."""
    seed = secrets.randbelow(10**6)
    count, _, findings = fuzz(fuzzer, 10.0, seed, keep=tmp_path / "found")
    told = f"python -m tests.fuzz {fuzzer} --seed {seed}"
    print(f"{told}: {count} cases")
    assert [finding.problem for finding in findings] == [], told
    assert count > 10
