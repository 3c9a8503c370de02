"""The wide sparse decode kernel: csrc/sm90/sparse_decode/wide/.

Rows reach the buffers in one of three ways (`Feed`): from a ring that each converting warp has for
itself, with one buffer, which is filled and freed by groups of columns; from a cluster's two
blocks, each of which converts every other quarter of a tile for both; as they are. In a block by
itself two of the score warps stand for all; in a cluster one does, two quarters for four, and
queries are there. One warp stands for each other warpgroup. Where rows are copied, the value
products of a tile wait for the next scores to be issued if their keys are there already: `eager` is
the order where they are not; what happens lies between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from protocol import Role, Violation, explore

NO_DROPS: frozenset[tuple[str, str]] = frozenset()


@dataclass
class Feed:
    name: str
    blocks: int = 1
    quarters: int = 4  # of a tile
    buffers: int = 2
    slots: int = 0  # tiles in the ring
    in_rope: bool = True  # probabilities take the place of rope columns
    plans: int = 4
    sums: int = 3


RING = Feed("ring", buffers=1, slots=2, in_rope=False)  # its `quarters` are groups of columns
PEERS = Feed("peers", blocks=2, quarters=2)
COPY = Feed("copy")
FILLED = (0, 2), (1,), (3,)  # groups of a ring's buffer; the left values have 0 and 1


@dataclass
class Model:
    feed: Feed
    pieces: list[int]  # their tiles; empty pieces have no part in the protocol
    eager: bool = True
    drop: frozenset[tuple[str, str]] = NO_DROPS

    def __post_init__(self) -> None:
        alone = self.feed.blocks == 1
        self.total = sum(self.pieces)
        self.scores = ("score0", "score1") if alone else ("score",)
        self.values = ("left", "right") if alone else ("value",)
        self.has_query = alone
        self.quarters = range(self.feed.quarters)
        self.parts = range(2)  # of the rope columns, by who writes them

    def buffer(self, tile: int) -> int:
        return tile % self.feed.buffers

    def round(self, tile: int) -> int:
        return tile // self.feed.buffers

    def at(self, name: str, block: int, tile: int) -> tuple:
        return name, block, self.buffer(tile)

    def keys(self, block: int, quarter: int, tile: int) -> tuple:
        return "keys", block, quarter, self.buffer(tile)

    def all_keys(self, block: int, tile: int) -> list[tuple]:
        return [self.keys(block, quarter, tile) for quarter in self.quarters]

    def place(self, block: int, part: int, tile: int) -> tuple:
        """Of probabilities."""
        return "rope" if self.feed.in_rope else "p", block, part, self.buffer(tile)

    def places(self, block: int, tile: int) -> list[tuple]:
        return [self.place(block, part, tile) for part in self.parts]

    def plan(self, block: int, tile: int) -> tuple:
        return "plan", block, tile % self.feed.plans

    def read_keys(self, warp: Role, block: int, tile: int) -> None:
        """For the scores."""
        if self.feed.name == "ring":
            for part, groups in enumerate(FILLED):
                warp.wait(("keys_full", block, part), tile)
                warp.read(tile + 1, *(self.keys(block, group, tile) for group in groups))
                if part == 0:
                    warp.read(tile // self.feed.slots + 1, self.rope(tile))
        else:
            warp.wait(self.at("keys_full", block, tile), self.round(tile))
            warp.read(self.round(tile) + 1, *self.all_keys(block, tile))
        if self.feed.in_rope:
            warp.read(2 * self.round(tile) + 1, *self.places(block, tile))

    def rope(self, tile: int) -> tuple:
        """A ring's, which has places of its own."""
        return "rope", tile % self.feed.slots

    def owners(self, quarter: int) -> list[int]:
        """The blocks that are told when a quarter's place is free."""
        last = quarter == self.quarters[-1]
        return list(range(self.feed.blocks)) if last else [quarter % self.feed.blocks]

    def score_warp(self, block: int, name: str) -> Role:
        warp, tile = Role(f"{name}-{block}", self.drop), 0
        first = name == self.scores[0]
        mine = self.parts if len(self.scores) == 1 else [self.scores.index(name)]
        holds = self.feed.name == "copy"

        def load_query() -> None:
            if first and self.has_query:
                warp.arrive(("query_issued", block))

        load_query()
        for n, tiles in enumerate(self.pieces):
            if self.has_query:
                warp.wait(("query_full", block), n)
            for left in reversed(range(tiles)):
                go = self.at("values_go", block, tile - 1)  # of the tile before
                if holds and self.eager and tile > 0:
                    warp.arrive(go)
                self.read_keys(warp, block, tile)
                query = [("query", block)] if self.has_query else []
                warp.read(n + 1, *query)
                if holds and not self.eager and tile > 0:
                    warp.arrive(go)
                warp.end(*self.all_keys(block, tile), *query)
                if self.feed.in_rope:
                    warp.end(*self.places(block, tile))
                if self.feed.name == "ring":
                    warp.end(self.rope(tile))
                warp.arrive(self.at("scores_done", block, tile))
                warp.read(tile // self.feed.plans + 1, self.plan(block, tile))
                warp.end(self.plan(block, tile))
                rescale = ("rescale", block, name, self.buffer(tile))
                stored = [self.place(block, part, tile) for part in mine]
                warp.write(rescale)
                warp.wait(self.at("scores_done", block, tile), self.round(tile))
                warp.write(*stored)
                if left == 0:
                    sums = ("inverse_sum", block, name, n % self.feed.sums)
                    warp.write(sums)
                    warp.end(sums)
                    if n + 1 < len(self.pieces):
                        load_query()
                warp.end(rescale, *stored)
                warp.arrive(self.at("probabilities_stored", block, tile))
                if not holds or tile + 1 == self.total:
                    warp.arrive(self.at("values_go", block, tile))
                tile += 1
        return warp

    def value_warp(self, block: int, name: str) -> Role:
        warp, tile = Role(f"{name}-{block}", self.drop), 0
        for n, tiles in enumerate(self.pieces):
            for _ in range(tiles):
                round = self.round(tile)
                powers = [("rescale", block, score, self.buffer(tile)) for score in self.scores]
                warp.wait(self.at("probabilities_stored", block, tile), round)
                warp.read(round + 1, *powers)
                warp.wait(self.at("values_go", block, tile), round)
                mine = self.quarters
                if self.feed.name == "ring":
                    mine = range(2) if name == "left" else range(2, 4)
                warp.read(round + 1, *(self.keys(block, quarter, tile) for quarter in mine))
                written = 2 * round + 2 if self.feed.in_rope else round + 1
                warp.read(written, *self.places(block, tile))
                warp.end(*powers)
                for quarter in mine:
                    warp.end(self.keys(block, quarter, tile))
                    if quarter == mine[-1]:
                        warp.end(*self.places(block, tile))
                    if self.feed.name == "ring":
                        warp.arrive(("keys_empty", block, quarter % 2, 0))
                        continue
                    for owner in self.owners(quarter):
                        warp.arrive(("keys_empty", owner, quarter, self.buffer(tile)))
                tile += 1
            sums = [("inverse_sum", block, score, n % self.feed.sums) for score in self.scores]
            warp.read(n // self.feed.sums + 1, *sums)
            warp.end(*sums)
        return warp

    def make_plan(self, warp: Role, block: int, tile: int) -> None:
        warp.write(self.plan(block, tile))
        warp.end(self.plan(block, tile))

    def wait_empty(self, warp: Role, block: int, quarter: int, tile: int) -> None:
        empty = ("keys_empty", block, quarter, self.buffer(tile))
        warp.wait(empty, self.round(tile) - 1)

    def copy_warp(self) -> Role:
        """It arrives when its copies are there."""
        warp = Role("convert", self.drop)
        for tile in range(self.total):
            self.make_plan(warp, 0, tile)
            for quarter in self.quarters:
                self.wait_empty(warp, 0, quarter, tile)
                warp.write(self.keys(0, quarter, tile))
            warp.write(*self.places(0, tile))
            warp.end(*self.all_keys(0, tile), *self.places(0, tile))
            warp.arrive(self.at("keys_full", 0, tile))
        return warp

    def ring_warp(self) -> Role:
        """A tile's rope is brought when the one that had its place has been scored."""
        warp = Role("convert", self.drop)
        for tile in range(min(self.feed.slots, self.total)):
            self.make_plan(warp, 0, tile)
        warp.write(self.rope(0))
        for tile in range(self.total):
            warp.end(self.rope(tile))
            warp.wait(self.at("probabilities_stored", 0, 0), tile - 1)
            if tile + 1 < self.total:
                warp.write(self.rope(tile + 1))
            for part, groups in enumerate(FILLED):
                self.wait_empty(warp, 0, min(part, 1), tile)
                keys = [self.keys(0, group, tile) for group in groups]
                warp.write(*keys)
                warp.end(*keys)
                warp.arrive(("keys_full", 0, part))
            if tile + self.feed.slots < self.total:
                self.make_plan(warp, 0, tile + self.feed.slots)
        return warp

    def peer_warp(self, block: int) -> Role:
        """Quarter `block` is its own, and that part of the rope columns."""
        warp = Role(f"convert-{block}", self.drop)
        self.make_plan(warp, block, 0)
        for tile in range(self.total):
            mine = self.keys(block, block, tile), self.place(block, block, tile)
            if tile + 1 < self.total:
                self.make_plan(warp, block, tile + 1)
            self.wait_empty(warp, block, block, tile)
            warp.write(mine[0])
            self.wait_empty(warp, block, self.quarters[-1], tile)
            warp.write(mine[1])
            warp.end(*mine)
            warp.arrive(("sent", block, tile), self.at("keys_full", block, tile))
        return warp

    def peer_engine(self, block: int) -> Role:
        """What a block sends its peer: copies of its keys, and stores of rope columns."""
        engine, peer = Role("engine", self.drop), 1 - block
        for tile in range(self.total):
            ours, theirs = self.keys(block, block, tile), self.keys(peer, block, tile)
            rope = self.place(peer, block, tile)
            engine.wait(("sent", block, tile), 0)
            engine.read(self.round(tile) + 1, ours)
            engine.write(theirs, rope)
            engine.end(ours, theirs, rope)
            engine.arrive(self.at("keys_full", peer, tile))
        return engine

    def query_engine(self, block: int) -> Role:
        copies = Role("tma", self.drop)
        for n in range(len(self.pieces)):
            copies.wait(("query_issued", block), n)
            copies.write(("query", block))
            copies.end(("query", block))
            copies.arrive(("query_full", block))
        return copies

    def explore(self) -> int:
        blocks = range(self.feed.blocks)
        arrivals = {
            "keys_full": self.feed.blocks,
            "keys_empty": self.feed.blocks * len(self.values),
            "scores_done": len(self.scores),
            "probabilities_stored": len(self.scores),
            "values_go": len(self.scores),
        }
        roles = [
            *(self.score_warp(block, name) for block in blocks for name in self.scores),
            *(self.value_warp(block, name) for block in blocks for name in self.values),
        ]
        if self.feed.name == "ring":
            roles.append(self.ring_warp())
        elif self.feed.name == "peers":
            roles += [
                role(block) for block in blocks for role in (self.peer_warp, self.peer_engine)
            ]
        else:
            roles.append(self.copy_warp())
        if self.has_query:
            roles.append(self.query_engine(0))
        return explore(roles, lambda name: arrivals.get(name[0], 1))


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(
    ("feed", "pieces"),
    [
        (COPY, [7]),
        (COPY, [2, 3]),
        (RING, [7]),
        (RING, [1] * 4),
        (PEERS, [3]),
        (PEERS, [1, 1]),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_every_interleaving_is_safe(feed, pieces, eager):
    assert Model(feed, pieces, eager).explore() > 50


@pytest.mark.parametrize(
    ("feed", "role", "barrier"),
    [
        (COPY, "score", "keys_full"),
        (COPY, "score", "query_full"),
        (COPY, "score", "scores_done"),
        (COPY, "left", "probabilities_stored"),
        (COPY, "convert", "keys_empty"),
        (RING, "score", "keys_full"),
        (RING, "left", "probabilities_stored"),
        (RING, "convert", "keys_empty"),
        (RING, "convert", "probabilities_stored"),
        (PEERS, "score", "keys_full"),
        (PEERS, "value", "probabilities_stored"),
        (PEERS, "convert", "keys_empty"),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_what_each_wait_is_for(feed, role, barrier):
    with pytest.raises(Violation):
        Model(feed, [3, 2], drop=frozenset({(role, barrier)})).explore()


@pytest.mark.parametrize(("feed", "plans"), [(RING, 2), (PEERS, 3)], ids=["ring", "peers"])
def test_a_ring_of_plans_must_be_longer_than_what_is_planned_ahead(feed, plans):
    with pytest.raises(Violation, match="plan"):
        Model(replace(feed, plans=plans), [7]).explore()


def test_sums_of_two_pieces_would_not_do():
    """A value warpgroup stores a piece while two more are computed."""
    with pytest.raises(Violation, match="inverse_sum"):
        Model(replace(COPY, sums=2), [1] * 4).explore()
