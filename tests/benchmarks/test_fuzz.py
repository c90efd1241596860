"""The `fuzz` suite: a small part of it for each reader, and that it notices what it is there for."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import fuzz
from fastjepa.data.turbo import find_turbo


def has_turbo() -> bool:
    try:
        find_turbo()
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", fuzz.READERS)
def test_each_reader_reads_or_refuses(name):
    if "turbo" in name and not has_turbo():
        pytest.skip("libjpeg-turbo 3 is not installed")
    row = fuzz.fuzz(name, 150, seed=1)
    assert row["found"] == []
    assert row["inputs"] == row["read"] + row["refused"] == 150
    assert row["read"]
    assert row["refused"]


def bad(kind: str):
    def read(path: Path) -> None:
        data = path.read_bytes()
        if len(data) % 2 and kind == "raises":
            raise KeyError("odd")
        if len(data) % 2 and kind == "dies":
            os._exit(7)
        if len(data) % 2 and kind == "hangs":
            while True:
                time.process_time()
        if len(data) % 2 and kind == "waits":
            time.sleep(1000)
        if kind == "takes memory":
            bytearray(2 * fuzz.MEMORY)
        raise ValueError("two\nlines" if kind == "talks" else "one line")

    return read


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("raises", "KeyError: 'odd'"),
        ("dies", "the process ended with 7"),
        ("hangs", "_TooLong"),
        ("waits", "the process ended with -6"),
        ("takes memory", "MemoryError"),
        ("talks", "refused in more than a line"),
    ],
)
def test_what_must_not_be_is_noticed(monkeypatch, kind, said):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "PATIENCE", 3.0 if kind == "waits" else fuzz.PATIENCE)
    reader = replace(fuzz.READERS["results of suites"], read=bad(kind), by_hand=list)
    monkeypatch.setitem(fuzz.READERS, "bad", reader)
    row = fuzz.fuzz("bad", 12)
    assert any(said in line for line in row["found"])
    assert fuzz.faults([row], None)[0].startswith("bad: ")


def test_inputs_follow_from_the_seed():
    seeds = [b"a" * 50, b"b" * 80]
    first, again = ([fuzz.mutated(seeds[0], seeds, fuzz.random.Random(3)) for _ in range(5)] for _ in range(2))
    assert first == again
    assert first[0] != seeds[0]
