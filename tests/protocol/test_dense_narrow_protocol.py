"""The narrow dense decode kernel's ring: csrc/sm90/dense_decode/narrow/{score,values,load}.cuh.

One barrier stands for those of a load's three parts; two of the score warps and one of each value
warpgroup for all.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

STAGES = 2
SCORES = ("score0", "score1")
VALUES = ("left", "right")
ROPE = [("rope", part) for part in SCORES]  # a tile's rope columns, then a score warp's P^T
LATENT = [("latent", half) for half in VALUES]
QUERIES = [("query", name) for name in SCORES]
ARRIVALS = {
    "named": len(SCORES),
    "probabilities_stored": len(SCORES),
    "load_done": len(VALUES),
    "sums_empty": len(VALUES),
}


def in_slot(load: int, *buffers: tuple) -> list[tuple]:
    return [(*buffer, load % STAGES) for buffer in buffers]


class Writes:
    """How often a slot's buffers have been written, by load; queries have load None of P."""

    def __init__(self, pieces: list[int]) -> None:
        self.latent, self.zeroed, self.rope, self.p = {}, {}, {}, {}
        latent, rope, load = [0] * STAGES, [0] * STAGES, 0
        for tiles in pieces:
            for n in range(tiles + 1):
                slot = load % STAGES
                latent[slot] += 1
                rope[slot] += 1
                self.latent[load], self.rope[load] = latent[slot], rope[slot]
                latent[slot] += 0 < n == tiles  # the last tile's rows past the end are zeroed
                rope[slot] += n > 0
                self.zeroed[load], self.p[load] = latent[slot], rope[slot]
                load += 1
        self.loads = load


def score_warp(name: str, pieces: list[int], writes: Writes, drop: set, raises: bool) -> Role:
    warp = Role(name, drop)
    leads = name == SCORES[0]
    load, sums, exchanges = 0, 0, [0, 0]
    turn = 0

    def take(*more: tuple) -> None:
        warp.wait(("full", load % STAGES), load // STAGES)
        warp.read(writes.latent[load], *in_slot(load, *LATENT))
        warp.read(writes.rope[load], *in_slot(load, *ROPE))

    def combine() -> None:
        nonlocal turn
        exchanges[turn] += 1
        warp.write(("exchange", name, turn))
        warp.end(("exchange", name, turn))
        warp.meet(("named",))
        all_of = [("exchange", other, turn) for other in SCORES]
        warp.read(exchanges[turn], *all_of)
        warp.end(*all_of)
        turn ^= 1

    for n, tiles in enumerate(pieces, 1):
        take()
        warp.write(("query", name))
        warp.end(*in_slot(load, *LATENT, *ROPE), ("query", name))
        warp.meet(("named",))
        warp.arrive(("probabilities_stored", load % STAGES))
        load += 1
        for tile in range(tiles):
            take()
            warp.read(n, *QUERIES)
            warp.end(*in_slot(load, *LATENT, *ROPE), *QUERIES)
            if tile > 0:
                warp.meet(("named",))  # the vote whether references rise
            if tile == 0 or raises:
                combine()
            mine = in_slot(load, ("rope", name), *([("rescale",)] if leads else []))
            warp.write(*mine)
            warp.end(*mine)
            warp.arrive(("probabilities_stored", load % STAGES))
            load += 1
        if tiles:
            combine()
            if leads:
                warp.wait(("sums_empty",), sums - 1)
                warp.write(("inverse_sum",))
                warp.end(("inverse_sum",))
                warp.arrive(("sums_full",))
            sums += 1
    return warp


def value_warp(name: str, pieces: list[int], writes: Writes, drop: set) -> Role:
    warp = Role(name, drop)
    load, sums, powers = 0, 0, [0] * STAGES
    for tiles in pieces:
        warp.wait(("probabilities_stored", load % STAGES), load // STAGES)
        warp.arrive(("load_done", load % STAGES))
        load += 1
        for tile in range(tiles):
            slot, round = load % STAGES, load // STAGES
            warp.wait(("full", slot), round)
            warp.wait(("probabilities_stored", slot), round)
            mine = in_slot(load, ("latent", name))
            if tile == tiles - 1:
                warp.write(*mine)
                warp.end(*mine)
            powers[slot] += 1
            warp.read(powers[slot], ("rescale", slot))
            warp.read(writes.p[load], *in_slot(load, *ROPE))
            warp.read(writes.zeroed[load], *mine)
            warp.end(*in_slot(load, *ROPE), ("rescale", slot), *mine)
            warp.arrive(("load_done", slot))
            load += 1
        if tiles:
            warp.wait(("sums_full",), sums)
            sums += 1
            warp.read(sums, ("inverse_sum",))
            warp.end(("inverse_sum",))
            warp.arrive(("sums_empty",))
    return warp


def loader(writes: Writes, drop: set) -> Role:
    warp = Role("loader", drop)
    for load in range(writes.loads):
        warp.wait(("load_done", load % STAGES), load // STAGES - 1)
        warp.arrive(("issued", load % STAGES))
    return warp


def engine(slot: int, writes: Writes, drop: set) -> Role:
    """The copies into one slot, which end some time after they were issued."""
    copies = Role(f"tma{slot}", drop)
    for load in range(slot, writes.loads, STAGES):
        copies.wait(("issued", slot), load // STAGES)
        copies.write(*in_slot(load, *LATENT, *ROPE))
        copies.end(*in_slot(load, *LATENT, *ROPE))
        copies.arrive(("full", slot))
    return copies


def check(pieces: list[int], drop: set = frozenset(), *, raises: bool = True) -> int:
    writes = Writes(pieces)
    roles = [
        *(score_warp(name, pieces, writes, drop, raises) for name in SCORES),
        *(value_warp(name, pieces, writes, drop) for name in VALUES),
        loader(writes, drop),
        *(engine(slot, writes, drop) for slot in range(STAGES)),
    ]
    return explore(roles, lambda name: ARRIVALS.get(name[0], 1))


@pytest.mark.parametrize("pieces", [[1], [6], [2, 1], [1, 0, 0, 0, 1], [0, 3], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("raises", [False, True])
def test_every_interleaving_is_safe(pieces, raises):
    assert check(pieces, raises=raises) > 100


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "named"),
        ("score", "sums_empty"),
        ("left", "probabilities_stored"),
        ("left", "sums_full"),
        ("loader", "load_done"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        check([3, 1, 2], {dropped})
