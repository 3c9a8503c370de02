"""The narrow sparse decode kernel: csrc/sm90/sparse_decode/narrow/{scores,query,values,gather}.cuh.

A tile's rows lie in slots, one for each score warp, which the last value warpgroup's warps gather:
each its slot, ahead of what it computes. Two slots, score warps and gathering warps stand for four;
in a second model one of each, and a warp of the value warpgroups that only compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from protocol import Role, Violation, explore

BUFFERS = 2  # of probabilities


@dataclass(frozen=True)
class Model:
    pieces: list[int]  # their tiles; empty ones have no part in the protocol
    slots: int = 2
    computing: int = 0  # value warps that do not gather
    stages: int = 4
    query_items: int = 1  # of the ring, that a piece's queries take
    drop: frozenset = frozenset()

    @property
    def items(self) -> list[bool]:
        """Of the part in order: whether an item is queries."""
        queries, tile = [True] * self.query_items, [False]
        return [item for tiles in self.pieces for item in queries + tile * tiles]

    @property
    def value_warps(self) -> int:
        return self.slots + self.computing

    def ring(self, item: int) -> list[tuple]:
        return [("ring", slot, item % self.stages) for slot in range(self.slots)]

    def of_slots(self, name: str, item: int) -> list[tuple]:
        return [(name, slot, item % self.stages) for slot in range(self.slots)]

    def of_scores(self, name: str, *rest: int) -> list[tuple]:
        return [(name, slot, *rest) for slot in range(self.slots)]

    def score_warp(self, slot: int) -> Role:
        warp = Role(f"score{slot}", self.drop)
        item, tile, scales = 0, 0, [0] * self.stages
        for n, tiles in enumerate(self.pieces):
            for i in range(item, item + self.query_items):
                for other in range(self.slots):
                    warp.wait(("full", other, i % self.stages), i // self.stages)
                warp.read(i // self.stages + 1, *self.ring(i))
            warp.meet(("named",))  # the queries' largest value
            warp.write(("query", slot))
            for i in range(item, item + self.query_items):
                warp.end(*self.ring(i))
                for _ in range(self.value_warps // self.slots):  # on the value warps' behalf
                    warp.arrive(*self.of_slots("empty", i))
            item += self.query_items
            warp.end(("query", slot))
            warp.meet(("named",))
            for _ in range(tiles):
                stage, buffer = item % self.stages, tile % BUFFERS
                mine = ("scales", slot, stage)
                warp.wait(("full", slot, stage), item // self.stages)
                warp.read(item // self.stages + 1, ("ring", slot, stage))
                warp.write(mine)
                scales[stage] += 1
                warp.end(mine)
                warp.meet(("named",))  # the vote whether there are large scales
                warp.read(n + 1, *self.of_scores("query"))
                warp.end(("ring", slot, stage), *self.of_scores("query"))
                warp.wait(("probabilities_empty", buffer), tile // BUFFERS - 1)
                warp.meet(("named",))  # the vote whether references rise
                stored = [("p", slot, buffer), *([("rescale", buffer)] if slot == 0 else [])]
                warp.write(*stored)
                warp.end(*stored)
                warp.arrive(("probabilities_full", buffer))
                item += 1
                tile += 1
            warp.meet(("named",))  # the rows' sums
            if slot == 0:
                warp.wait(("sums_empty",), n - 1)
                warp.write(("inverse_sum",))
                warp.end(("inverse_sum",))
                warp.arrive(("sums_full",))
        return warp

    def value_warp(self, name: str, gathers: int | None = None) -> Role:
        """gathers: the slot that it fills."""
        warp = Role(name, self.drop)
        items, item, tile, room, filled, freed = self.items, 0, 0, self.stages, 0, 0
        scales = [0] * self.stages
        for n, tiles in enumerate(self.pieces):
            item += self.query_items
            freed += self.query_items
            for _ in range(tiles):
                stage, round, buffer = item % self.stages, item // self.stages, tile % BUFFERS
                if gathers is not None and filled < len(items):
                    room += freed
                    while room > 0 and filled < len(items):
                        room -= 1
                        at = filled % self.stages
                        warp.wait(("empty", gathers, at), filled // self.stages - 1)
                        warp.arrive(("issued", gathers, at))
                        filled += 1
                for slot in range(self.slots):
                    warp.wait(("full", slot, stage), round)
                warp.read(round + 1, *self.ring(item))
                warp.wait(("probabilities_full", buffer), tile // BUFFERS)
                scales[stage] += 1
                p = [*self.of_scores("p", buffer), ("rescale", buffer)]
                warp.read(tile // BUFFERS + 1, *p)
                warp.read(scales[stage], *self.of_slots("scales", item))
                for slot in range(self.slots):  # as soon as their bytes are in registers
                    warp.end(("ring", slot, stage), ("scales", slot, stage))
                    warp.arrive(("empty", slot, stage))
                warp.end(*p)
                warp.arrive(("probabilities_empty", buffer))
                freed = 1
                item += 1
                tile += 1
            warp.wait(("sums_full",), n)
            warp.read(n + 1, ("inverse_sum",))
            warp.end(("inverse_sum",))
            warp.arrive(("sums_empty",))
        return warp

    def engine(self, slot: int, stage: int) -> Role:
        copies = Role("tma", self.drop)
        for round in range(len(range(stage, len(self.items), self.stages))):
            copies.wait(("issued", slot, stage), round)
            copies.write(("ring", slot, stage))
            copies.end(("ring", slot, stage))
            copies.arrive(("full", slot, stage))
        return copies

    def explore(self) -> int:
        arrivals = {
            "named": self.slots,
            "probabilities_full": self.slots,
            "probabilities_empty": self.value_warps,
            "empty": self.value_warps,
            "sums_empty": self.value_warps,
        }
        roles = [
            *(self.score_warp(slot) for slot in range(self.slots)),
            *(self.value_warp(f"gather{slot}", slot) for slot in range(self.slots)),
            *(self.value_warp(f"value{n}") for n in range(self.computing)),
            *(self.engine(s, stage) for s in range(self.slots) for stage in range(self.stages)),
        ]
        return explore(roles, lambda name: arrivals.get(name[0], 1))


ONE = {"slots": 1, "computing": 1}


@pytest.mark.parametrize(
    "model",
    [
        Model([1]),
        Model([2]),
        Model([7], **ONE),
        Model([2, 1, 3], **ONE),
        Model([1] * 4, **ONE),
        Model([3, 2], **ONE, stages=3, query_items=2),
    ],
    ids=str,
)
def test_every_interleaving_is_safe(model):
    assert model.explore() > 50


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "probabilities_empty"),
        ("score", "sums_empty"),
        ("value", "probabilities_full"),
        ("value", "sums_full"),
        ("gather", "empty"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        Model([3, 2, 2], **ONE, drop=frozenset({dropped})).explore()


def test_score_warps_meet_before_they_read_each_other_s_queries():
    with pytest.raises(Violation, match="query"):
        Model([1], drop=frozenset({("score", "named")})).explore()
