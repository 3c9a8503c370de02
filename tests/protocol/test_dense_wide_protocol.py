"""The wide dense decode kernel's ring: csrc/sm90/dense_decode/wide/{score,values,load}.cuh.

A load's three parts have barriers that are used alike; one stands for them. Two of the score warps
and one of each value warpgroup stand for all; where one lane arrives for its warp, the warp does.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

STAGES = 3
SCORES = ("score0", "score1")
VALUES = ("left", "right")
ROPE = [("rope", part) for part in SCORES]  # a tile's rope columns, then a score warp's P


class Loads:
    """The loads of a part in order: for each piece its queries, then its tiles."""

    def __init__(self, pieces: list[int]) -> None:
        self.pieces: list[tuple[int, range]] = []  # load of the queries; of the tiles
        self.versions: dict[tuple[int, str], int] = {}  # writes to a slot's buffers so far
        written: dict[tuple[str, int], int] = {}
        for tiles in pieces:
            first = self.count
            self.pieces.append((first, range(first + 1, first + 1 + tiles)))
            for load in range(first, first + 1 + tiles):
                is_tail = load == first + tiles and tiles > 0  # its rows past the end are zeroed
                for event in ("latent", "rope", *(["zeroed"] * is_tail), "p"):
                    if event == "p" and load == first:
                        continue
                    buffer = {"zeroed": "latent", "p": "rope"}.get(event, event), load % STAGES
                    written[buffer] = written.get(buffer, 0) + 1
                    self.versions[load, event] = written[buffer]

    @property
    def count(self) -> int:
        return self.pieces[-1][1].stop if self.pieces else 0

    def read(self, role: Role, load: int, event: str, *buffers: tuple) -> None:
        slot = load % STAGES
        role.read(self.versions[load, event], *((*buffer, slot) for buffer in buffers))


def latent() -> list[tuple]:
    return [("latent", half) for half in VALUES]


def of(load: int, *names: str) -> list[tuple]:
    return [(name, load % STAGES) for name in names]


def score_warp(name: str, loads: Loads, drop: set) -> Role:
    warp = Role(name, drop)
    full_pieces = 0
    all_queries = [("query", other) for other in SCORES]

    def start(load: int) -> None:
        warp.wait(("full", load % STAGES), load // STAGES)
        loads.read(warp, load, "latent", *latent())
        loads.read(warp, load, "rope", *ROPE)

    def end(load: int) -> None:
        warp.end(*((*buffer, load % STAGES) for buffer in (*latent(), *ROPE)))

    for query, (queries, tiles) in enumerate(loads.pieces, 1):
        start(queries)
        warp.write(("query", name))
        end(queries)
        warp.end(("query", name))
        warp.meet(("named", "scores"))
        warp.arrive(*of(queries, "scores_done", "probabilities_stored", "values_go", "load_done"))
        for load in tiles:
            if load == tiles.start:
                start(load)
                warp.read(query, *all_queries)
            end(load)
            warp.end(*all_queries)
            warp.arrive(*of(load, "scores_done"))
            warp.write(("rescale", name, load % STAGES))
            warp.wait(("scores_done", load % STAGES), load // STAGES)
            warp.write(("rope", name, load % STAGES))
            if load == tiles.stop - 1:
                warp.write(("inverse_sum", name, full_pieces % 2))
                warp.end(("inverse_sum", name, full_pieces % 2))
                full_pieces += 1
            warp.end(("rescale", name, load % STAGES), ("rope", name, load % STAGES))
            warp.arrive(*of(load, "probabilities_stored", "load_done"))
            if load + 1 < tiles.stop:
                start(load + 1)
                warp.read(query, *all_queries)
            warp.arrive(*of(load, "values_go"))
    return warp


def value_warp(name: str, loads: Loads, drop: set) -> Role:
    warp = Role(name, drop)
    full_pieces = 0
    powers: dict[int, int] = {}  # writes to a slot's rescale powers
    issued = 0

    def issue() -> None:
        nonlocal issued
        if name == "right" and issued < loads.count:
            warp.arrive(*of(issued, "issued"))
            issued += 1

    def release(load: int) -> None:
        warp.arrive(*of(load, "load_done"))
        if name == "right":
            warp.wait(("load_done", load % STAGES), load // STAGES)
            issue()

    for _ in range(STAGES):
        issue()
    for queries, tiles in loads.pieces:
        warp.wait(("full", queries % STAGES), queries // STAGES)
        release(queries)
        for load in tiles:
            slot, round = load % STAGES, load // STAGES
            mine = ("latent", name, slot)
            warp.wait(("full", slot), round)
            if load == tiles.stop - 1:
                warp.wait(("scores_done", slot), round)
                warp.write(mine)
                warp.end(mine)
            warp.wait(("probabilities_stored", slot), round)
            powers[slot] = powers.get(slot, 0) + 1
            rescale = [("rescale", score, slot) for score in SCORES]
            warp.read(powers[slot], *rescale)
            warp.wait(("values_go", slot), round)
            loads.read(warp, load, "p", *ROPE)
            event = "zeroed" if load == tiles.stop - 1 else "latent"
            loads.read(warp, load, event, ("latent", name))
            warp.end(mine, *rescale, *((*part, slot) for part in ROPE))
            release(load)
        if tiles:
            sums = [("inverse_sum", score, full_pieces % 2) for score in SCORES]
            warp.read(full_pieces // 2 + 1, *sums)
            warp.end(*sums)
            full_pieces += 1
    return warp


def engine(slot: int, loads: Loads, drop: set) -> Role:
    """The copies into one slot, which end some time after they were issued."""
    copies = Role(f"tma{slot}", drop)
    buffers = [(*buffer, slot) for buffer in (*latent(), *ROPE)]
    for load in range(slot, loads.count, STAGES):
        copies.wait(("issued", slot), load // STAGES)
        copies.write(*buffers)
        copies.end(*buffers)
        copies.arrive(("full", slot))
    return copies


ARRIVALS = {
    "named": len(SCORES),
    "scores_done": len(SCORES),
    "probabilities_stored": len(SCORES),
    "values_go": len(SCORES),
    "load_done": len(SCORES) + len(VALUES),
}


def check(pieces: list[int], drop: set = frozenset()) -> int:
    loads = Loads(pieces)
    roles = [
        *(score_warp(name, loads, drop) for name in SCORES),
        *(value_warp(name, loads, drop) for name in VALUES),
        *(engine(slot, loads, drop) for slot in range(STAGES)),
    ]
    return explore(roles, lambda name: ARRIVALS.get(name[0], 1))


@pytest.mark.parametrize("pieces", [[1], [5], [2, 1], [1, 0, 0, 0, 0, 2], [0, 3]], ids=str)
def test_every_interleaving_is_safe(pieces):
    assert check(pieces) > 100


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "scores_done"),
        ("score", "named"),
        ("left", "probabilities_stored"),
        ("left", "scores_done"),  # before it zeroes a tail
        ("right", "load_done"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        check([3, 2], {dropped})


def test_value_warps_must_not_run_ahead_over_empty_pieces():
    """They wait for queries that they do not use: parities tell neighbouring phases apart only."""
    with pytest.raises(Violation):
        check([0] * 7, {("left", "full")})
