"""scripts/soak.py: it passes, and it notices what it is there to notice."""

from __future__ import annotations

import importlib.util
import itertools
import pathlib
import sys

import jax
import numpy as np
import pytest

from jax_flashmla import BlockAllocator, PagedCache, dense_decode

SCRIPT = pathlib.Path(__file__).parents[1] / "scripts" / "soak.py"
SMALL = ["--batch", "4", "--heads", "2", "--max-tokens", "500", "--chunk", "16"]
STEPS = ["--steps", "160", "--check-every", "2"]

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def soak(monkeypatch):
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)
    spec.loader.exec_module(module)
    return module


def test_passes_and_says_what_it_did(soak, capsys):
    assert soak.main([*SMALL, "--steps", "480", "--check-every", "6", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    last = next(line for line in said.splitlines() if line.startswith("step 480"))
    assert "0 faults" in last
    for event in ("restarts", "forks", "preemptions"):
        assert f" 0 {event}" not in last
    assert said.endswith("passed\n")


def test_reruns_have_equal_bits(soak, capsys):
    assert soak.main([*SMALL, "--reruns", "3"]) == 0
    assert "3 reruns of 4 sequences" in capsys.readouterr().out


def test_other_bits_are_noticed(soak, capsys, monkeypatch):
    noise = itertools.count()

    def noisy(q, *arguments, **options):
        out, lse = dense_decode(q, *arguments, **options)
        return out, lse + jax.pure_callback(
            lambda: np.float32(next(noise)), jax.ShapeDtypeStruct((), np.float32)
        )

    monkeypatch.setattr(soak, "dense_decode", noisy)
    assert soak.main([*SMALL, "--reruns", "3"]) == 1
    assert "3 of 3 reruns have other bits" in capsys.readouterr().out


def test_leaked_blocks_are_noticed(soak, capsys, monkeypatch):
    real = BlockAllocator._give_up
    monkeypatch.setattr(BlockAllocator, "_give_up", lambda self, ids: real(self, ids[1:]))
    assert soak.main([*SMALL, "--steps", "16"]) == 1
    assert "blocks are not free at the end" in capsys.readouterr().out


def test_blocks_of_two_writers_are_noticed(soak, capsys, monkeypatch):
    real = BlockAllocator.block_table

    def shares(self, *arguments):
        table = real(self, *arguments)
        table[0] = np.where(table[1] >= 0, table[1], table[0])
        return table

    monkeypatch.setattr(BlockAllocator, "block_table", shares)
    assert soak.main([*SMALL, *STEPS]) == 1
    said = capsys.readouterr().out
    assert "wrong against the reference" in said
    assert "hold" in said


def test_lost_rows_are_noticed(soak, capsys, monkeypatch):
    def loses_rows(self, rows, *, num_new):
        return self.advance(rows.shape[2], num_new)[0]

    monkeypatch.setattr(PagedCache, "append", loses_rows)
    assert soak.main([*SMALL, *STEPS]) == 1
    assert "wrong against the reference" in capsys.readouterr().out
