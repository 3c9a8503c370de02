"""The fp8 kernel of dense decode: csrc/sm90/dense_decode/fp8/{scores,query,values,load}.cuh.

Two score sides, which take turns at tiles and at the references that both go by, and the first of
which looks up where tiles are; value warps, which load in turn what comes to lie where a tile was.
A warp stands for each side.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from protocol import Role, Violation, explore

BUFFERS = 2  # of probabilities
PLAN_STEP = 2  # tiles from one look at where tiles are to the next
SIDES = range(2)


@dataclass(frozen=True)
class Model:
    pieces: list[int]  # their tiles; empty ones have no part in the protocol
    stages: int = 3
    places: int = 12  # tiles of which the places are kept
    value_warps: int = 2
    drop: frozenset = frozenset()

    def side(self, side: int) -> Role:
        warp = Role(f"score{side}", self.drop)
        queries = [("query", other) for other in SIDES]
        tile = raises = 0  # of the part; of this side
        if side == 1:
            warp.arrive(("turn", 0))
        warp.write(("query", side))  # copied, then scaled in place
        for n, tiles in enumerate(self.pieces):
            if side == 0:
                warp.write(("reference",))  # none yet
                warp.end(("reference",))
            warp.meet(("pair",))  # the queries' largest value
            warp.end(("query", side))
            warp.meet(("pair",))
            for number in range(tiles):
                buffer = tile % BUFFERS
                if buffer == side:
                    stage, round = tile % self.stages, tile // self.stages
                    warp.wait(("full", stage), round)
                    warp.read(round + 1, ("ring", stage))
                    warp.read(n + 1, *queries)
                    warp.end(*queries)
                    warp.wait(("probabilities_empty", buffer), tile // BUFFERS - 1)
                    warp.meet(("turn", side))
                    if number > 0:
                        warp.read((tile - 1) // BUFFERS + 1, ("raised", 1 - side))
                        warp.end(("raised", 1 - side))
                    moved = [("reference",), ("raised", side), ("warp_rows", side)]
                    warp.write(*moved)
                    warp.end(*moved)
                    raises += 1
                    warp.arrive(("turn", 1 - side))
                    warp.write(("p", buffer))
                    warp.end(("p", buffer), ("ring", stage))
                    warp.arrive(("probabilities_full", buffer))
                    if side == 0 and tile % PLAN_STEP == 0 and tile > 0:
                        warp.end(*self.planned(tile - PLAN_STEP) if tile > PLAN_STEP else ())
                        warp.write(*self.planned(tile))  # on their way until the next call
                tile += 1
            warp.meet(("pair",))  # no products are under way
            if n + 1 < len(self.pieces):
                warp.write(("query", side))
            last = (tile - 1) % BUFFERS
            if last != side:
                warp.read((tile - 1) // BUFFERS + 1, ("raised", last))
                warp.end(("raised", last))
            warp.write(("warp_rows", side))
            warp.end(("warp_rows", side))
            warp.meet(("pair",))
            if side == 0:
                warp.read(raises + n + 1, ("warp_rows", 0))
                warp.read(tile - raises + n + 1, ("warp_rows", 1))
                warp.read(tile + n + 1, ("reference",))
                warp.wait(("sums_empty",), n - 1)
                warp.write(("inverse_sum",))
                warp.end(("inverse_sum",), ("reference",), ("warp_rows", 0), ("warp_rows", 1))
                warp.arrive(("sums_full",))
        if tile % BUFFERS == side:
            warp.meet(("turn", side))
        return warp

    def planned(self, tile: int) -> list[tuple[str, int]]:
        """Places that are looked up after a tile."""
        ahead = 2 * PLAN_STEP + 2 + self.stages
        found = range(tile - PLAN_STEP + ahead if tile > 0 else 0, tile + ahead)
        return [("place", n % self.places) for n in found if n < sum(self.pieces)]

    def value_warp(self, number: int) -> Role:
        warp = Role(f"value{number}", self.drop)
        tile, total = 0, sum(self.pieces)
        if number == 0:
            warp.write(*self.planned(0))
            warp.end(*self.planned(0))
            for stage in range(min(self.stages, total)):
                warp.arrive(("issued", stage))
        for n, tiles in enumerate(self.pieces):
            for _ in range(tiles):
                stage, buffer = tile % self.stages, tile % BUFFERS
                warp.wait(("probabilities_full", buffer), tile // BUFFERS)
                warp.read(tile // self.stages + 1, ("ring", stage))
                warp.read(tile // BUFFERS + 1, ("p", buffer), ("raised", buffer))
                warp.end(("ring", stage))  # as soon as its bytes are in registers
                warp.arrive(("empty", stage))
                warp.end(("p", buffer), ("raised", buffer))
                warp.arrive(("probabilities_empty", buffer))
                again = tile + self.stages
                if tile % self.value_warps == number and again < total:
                    warp.wait(("empty", stage), tile // self.stages)
                    warp.read(again // self.places + 1, ("place", again % self.places))
                    warp.end(("place", again % self.places))
                    warp.arrive(("issued", stage))
                tile += 1
            warp.wait(("sums_full",), n)
            warp.read(n + 1, ("inverse_sum",))
            warp.end(("inverse_sum",))
            warp.arrive(("sums_empty",))
        return warp

    def engine(self, stage: int) -> Role:
        copies = Role("tma", self.drop)
        for round in range(len(range(stage, sum(self.pieces), self.stages))):
            copies.wait(("issued", stage), round)
            copies.write(("ring", stage))
            copies.end(("ring", stage))
            copies.arrive(("full", stage))
        return copies

    def explore(self) -> int:
        arrivals = {
            "pair": 2,
            "turn": 2,
            "probabilities_empty": self.value_warps,
            "empty": self.value_warps,
            "sums_empty": self.value_warps,
        }
        roles = [
            *map(self.side, SIDES),
            *map(self.value_warp, range(self.value_warps)),
            *map(self.engine, range(self.stages)),
        ]
        return explore(roles, lambda name: arrivals.get(name[0], 1))


@pytest.mark.parametrize(
    "model",
    [
        Model([1]),
        Model([5]),
        Model([2, 1, 1]),
        Model([14], stages=4, value_warps=1),
    ],
    ids=str,
)
def test_every_interleaving_is_safe(model: Model) -> None:
    assert model.explore() > 30


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "pair"),
        ("score", "turn"),
        ("score", "probabilities_empty"),
        ("score", "sums_empty"),
        ("value", "probabilities_full"),
        ("value", "sums_full"),
        ("value", "empty"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped: tuple[str, str]) -> None:
    with pytest.raises(Violation):
        Model([3, 2], drop=frozenset({dropped})).explore()
