"""The wide fp8 kernel's ring: csrc/sm90/dense_decode/fp8/wide/{scores,values,load}.cuh.

Two of the score warps and one of each value warpgroup stand for all; where one lane arrives for its
warp, the warp does. A value warp brings its part of a tile and converts it where it lies, a load
later; queries are copied as they are, and their bytes arrive in the place of one warp.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

STAGES = 3
SCORES = ("score0", "score1")
VALUES = ("left", "right")
ROPE = [("rope", part) for part in SCORES]  # a tile's rope columns, then a score warp's P
LATENT = [("latent", part) for part in VALUES]  # brought by a value warp, read by all
BROUGHT = {"left": [LATENT[0], ROPE[0]], "right": [LATENT[1], ROPE[1]]}


class Loads:
    """The loads of a part in order: of each piece that is not empty its queries, then its tiles."""

    def __init__(self, pieces: list[int]) -> None:
        self.pieces: list[tuple[int, range]] = []  # load of the queries; of the tiles
        self.versions: dict[tuple[int, str], int] = {}  # writes to a slot's buffers so far
        written: dict[tuple[str, int], int] = {}
        self.count = 0
        for tiles in filter(None, pieces):
            first, self.count = self.count, self.count + 1 + tiles
            self.pieces.append((first, range(first + 1, self.count)))
            for load in range(first, self.count):
                for event in ("latent", "rope", *(["p"] * (load > first))):
                    buffer = {"p": "rope"}.get(event, event), load % STAGES
                    written[buffer] = written.get(buffer, 0) + 1
                    self.versions[load, event] = written[buffer]
        self.tiles = {load for _, tiles in self.pieces for load in tiles}

    def read(self, role: Role, load: int, event: str, buffers: list[tuple]) -> None:
        role.read(self.versions[load, event], *of_slot(load, buffers))


def of_slot(load: int, buffers: list[tuple]) -> list[tuple]:
    return [(*buffer, load % STAGES) for buffer in buffers]


def of(load: int, *names: str) -> list[tuple]:
    return [(name, load % STAGES) for name in names]


def score_warp(name: str, loads: Loads, drop: set) -> Role:
    warp = Role(name, drop)
    all_queries = [("query", other) for other in SCORES]

    def start(load: int) -> None:
        warp.wait(("full", load % STAGES), load // STAGES)
        loads.read(warp, load, "latent", LATENT)
        loads.read(warp, load, "rope", ROPE)

    def end(load: int) -> None:
        warp.end(*of_slot(load, [*LATENT, *ROPE]))

    for finished, (queries, tiles) in enumerate(loads.pieces):
        start(queries)
        warp.write(("query", name))
        end(queries)
        warp.end(("query", name))
        warp.meet(("named", "scores"))
        warp.arrive(*of(queries, "scores_done", "probabilities_stored", "values_go"))
        for load in tiles:
            if load == tiles.start:
                start(load)
                warp.read(finished + 1, *all_queries)
            end(load)
            warp.end(*all_queries)
            warp.arrive(*of(load, "scores_done"))
            warp.write(("rescale", name, load % STAGES))
            warp.wait(("scores_done", load % STAGES), load // STAGES)
            warp.write(("rope", name, load % STAGES))
            if load == tiles.start:  # the piece before has been stored
                warp.wait(("load_done", queries % STAGES), queries // STAGES)
            if load == tiles.stop - 1:
                warp.write(("inverse_sum", name))
                warp.end(("inverse_sum", name))
            warp.end(("rescale", name, load % STAGES), ("rope", name, load % STAGES))
            warp.arrive(*of(load, "probabilities_stored"))
            if load + 1 < tiles.stop:
                start(load + 1)
                warp.read(finished + 1, *all_queries)
            warp.arrive(*of(load, "values_go"))
    return warp


def value_warp(name: str, loads: Loads, drop: set) -> Role:
    warp = Role(name, drop)
    powers: dict[int, int] = {}  # writes to a slot's rescale powers
    begun = 0

    def bring() -> None:
        nonlocal begun
        if begun in loads.tiles:
            warp.write(*of_slot(begun, BROUGHT[name]))
        elif begun < loads.count:
            warp.arrive(*of(begun, "issued" if name == "left" else "full"))
        begun += 1

    def convert(load: int) -> None:
        if load in loads.tiles:
            warp.end(*of_slot(load, BROUGHT[name]))
            warp.arrive(*of(load, "full"))

    def refill(load: int) -> None:
        warp.arrive(*of(load, "load_done"))
        warp.wait(("load_done", load % STAGES), load // STAGES)
        bring()

    for _ in range(STAGES):
        bring()
    convert(1)
    for finished, (queries, tiles) in enumerate(loads.pieces):
        convert(queries + 2)
        warp.wait(("probabilities_stored", queries % STAGES), queries // STAGES)
        refill(queries)
        for load in tiles:
            slot, round = load % STAGES, load // STAGES
            warp.wait(("probabilities_stored", slot), round)
            powers[slot] = powers.get(slot, 0) + 1
            rescale = [("rescale", score, slot) for score in SCORES]
            warp.read(powers[slot], *rescale)
            warp.wait(("values_go", slot), round)
            loads.read(warp, load, "p", ROPE)
            loads.read(warp, load, "latent", LATENT)
            convert(load + 2)
            warp.end(*of_slot(load, [*LATENT, *ROPE]), *rescale)
            refill(load)
        sums = [("inverse_sum", score) for score in SCORES]
        warp.read(finished + 1, *sums)
        warp.end(*sums)
    return warp


def engine(slot: int, loads: Loads) -> Role:
    """The copies of queries into one slot, which end some time after they were issued."""
    copies = Role(f"tma{slot}")
    for issued, load in enumerate(q for q, _ in loads.pieces if q % STAGES == slot):
        buffers = of_slot(load, [*LATENT, *ROPE])
        copies.wait(("issued", slot), issued)
        copies.write(*buffers)
        copies.end(*buffers)
        copies.arrive(("full", slot))
    return copies


ARRIVALS = {
    "full": len(VALUES),
    "named": len(SCORES),
    "scores_done": len(SCORES),
    "probabilities_stored": len(SCORES),
    "values_go": len(SCORES),
    "load_done": len(VALUES),
}


def check(pieces: list[int], drop: set = frozenset()) -> int:
    loads = Loads(pieces)
    roles = [
        *(score_warp(name, loads, drop) for name in SCORES),
        *(value_warp(name, loads, drop) for name in VALUES),
        *(engine(slot, loads) for slot in range(STAGES)),
    ]
    return explore(roles, lambda name: ARRIVALS.get(name[0], 1))


@pytest.mark.parametrize("pieces", [[1], [5], [1, 1, 1], [0, 3], [2, 0, 1, 2]], ids=str)
def test_every_interleaving_is_safe(pieces):
    assert check(pieces) > 100


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "scores_done"),
        ("score", "named"),
        ("score", "load_done"),
        ("left", "probabilities_stored"),
        ("right", "load_done"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        check([3, 1, 2], {dropped})
