"""The sparse prefill kernel's ring: csrc/sm90/sparse_prefill/{scores,values,gather}.cuh.

Two of the score warps and one of each value warpgroup stand for all; where one lane arrives for its
warp, the warp does. Each value warp copies its half of a load.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

STAGES = 3
SCORES = ("score0", "score1")
VALUES = ("left", "right")
ROPE = [("rope", part) for part in SCORES]  # a tile's rope columns, then a score warp's P
LATENT = [("latent", part) for part in VALUES]  # gathered by a value warp, read by all
COPIED = {"left": [LATENT[0], ROPE[0]], "right": [LATENT[1], ROPE[1]]}


class Loads:
    """The loads of a block in order: for each query token its heads, then its tiles."""

    def __init__(self, queries: list[int]) -> None:
        self.queries: list[tuple[int, range]] = []  # load of the heads; of the tiles
        self.versions: dict[tuple[int, str], int] = {}  # writes to a slot's buffers so far
        written: dict[tuple[str, int], int] = {}
        for tiles in queries:
            if tiles == 0:
                self.queries.append((-1, range(0)))
                continue
            first = self.count
            self.queries.append((first, range(first + 1, first + 1 + tiles)))
            for load in range(first, first + 1 + tiles):
                # In the heads' slot the last query token's output is staged afterwards.
                for event in ("latent", "rope", "staged" if load == first else "p"):
                    if event == "staged" and first == 0:
                        continue
                    buffer = {"p": "rope", "staged": "latent"}.get(event, event), load % STAGES
                    written[buffer] = written.get(buffer, 0) + 1
                    self.versions[load, event] = written[buffer]
        self.tiles = [load for _, tiles in self.queries for load in tiles]

    @property
    def count(self) -> int:
        return max((tiles.stop for _, tiles in self.queries), default=0)

    def read(self, role: Role, load: int, event: str, buffers: list[tuple]) -> None:
        role.read(self.versions[load, event], *of_slot(load, buffers))


def of_slot(load: int, buffers: list[tuple]) -> list[tuple]:
    return [(*buffer, load % STAGES) for buffer in buffers]


def of(load: int, *names: str) -> list[tuple]:
    return [(name, load % STAGES) for name in names]


def score_warp(name: str, loads: Loads, drop: set, ready: bool) -> Role:
    """ready: the next tile is always seen to be there before its turn."""
    warp = Role(name, drop)
    finished = 0
    heads = [("heads", other) for other in SCORES]

    def start(load: int) -> None:
        warp.wait(("full", load % STAGES), load // STAGES)
        loads.read(warp, load, "latent", LATENT)
        loads.read(warp, load, "rope", ROPE)

    def end(load: int) -> None:
        warp.end(*of_slot(load, [*LATENT, *ROPE]))

    taken = 0
    for query, tiles in loads.queries:
        if not tiles:
            continue
        start(query)
        warp.write(("heads", name))
        taken += 1
        end(query)
        warp.end(("heads", name))
        warp.meet(("named", "scores"))
        warp.arrive(("scores_done",), *of(query, "probabilities_stored", "values_go"))
        for load in tiles:
            if load == tiles.start:
                start(load)
                warp.read(taken, *heads)
            end(load)
            warp.end(*heads)
            warp.arrive(("scores_done",))
            attended = [("attended", other) for other in VALUES]
            warp.read(sum(t % STAGES == load % STAGES for t in loads.tiles if t <= load),
                      *of_slot(load, attended))  # fmt: skip
            warp.end(*of_slot(load, attended))
            warp.write(("rescale", name, load % STAGES))
            warp.wait(("scores_done",), load)
            warp.write(("rope", name, load % STAGES))
            if load == tiles.stop - 1:
                warp.write(("out_factor", name, finished % 2))
                warp.end(("out_factor", name, finished % 2))
                finished += 1
            warp.end(("rescale", name, load % STAGES), ("rope", name, load % STAGES))
            warp.arrive(*of(load, "probabilities_stored"))
            if not ready:
                warp.arrive(*of(load, "values_go"))
            if load + 1 < tiles.stop:
                start(load + 1)
                warp.read(taken, *heads)
            if ready:
                warp.arrive(*of(load, "values_go"))
    return warp


def value_warp(name: str, loads: Loads, drop: set) -> Role:
    warp = Role(name, drop)
    powers: dict[int, int] = {}  # writes to a slot's rescale powers
    issued = 0

    def load_next() -> None:
        nonlocal issued
        if issued >= loads.count:
            return
        if issued in loads.tiles:
            attended = ("attended", name, issued % STAGES)
            warp.write(attended)
            warp.end(attended)
        warp.arrive(*of(issued, "full"), ("issued", name, issued % STAGES))
        issued += 1

    def refill(load: int) -> None:
        warp.arrive(*of(load, "load_done"))
        warp.wait(("load_done", load % STAGES), load // STAGES)
        load_next()

    for _ in range(STAGES):
        load_next()
    queries = [query for query in loads.queries if query[1]]
    followings = [*queries[1:], None]
    for finished, ((heads, tiles), following) in enumerate(zip(queries, followings, strict=True)):
        for load in tiles:
            slot, round = load % STAGES, load // STAGES
            warp.wait(("probabilities_stored", slot), round)
            powers[slot] = powers.get(slot, 0) + 1
            rescale = [("rescale", score, slot) for score in SCORES]
            warp.read(powers[slot], *rescale)
            warp.wait(("values_go", slot), round)
            loads.read(warp, load, "p", ROPE)
            loads.read(warp, load, "latent", LATENT)
            if load == tiles.start:
                if heads > 0:  # what was staged has been stored
                    warp.end(("latent", name, heads % STAGES))
                refill(heads)
            warp.end(*of_slot(load, [*LATENT, *ROPE]), *rescale)
            refill(load)
        if following:
            slot = following[0] % STAGES
            warp.wait(("probabilities_stored", slot), following[0] // STAGES)
            warp.write(("latent", name, slot))
        factors = [("out_factor", score, finished % 2) for score in SCORES]
        warp.read(finished // 2 + 1, *factors)
        warp.end(*factors)
    return warp


def copies(name: str, slot: int, loads: Loads) -> Role:
    """What a value warp has begun to copy into a slot ends some time later."""
    role = Role(f"copies-{name}-{slot}")
    buffers = [(*buffer, slot) for buffer in COPIED[name]]
    for load in range(slot, loads.count, STAGES):
        role.wait(("issued", name, slot), load // STAGES)
        role.write(*buffers)
        role.end(*buffers)
        role.arrive(("full", slot))
    return role


ARRIVALS = {
    "full": 2 * len(VALUES),
    "named": len(SCORES),
    "scores_done": len(SCORES),
    "probabilities_stored": len(SCORES),
    "values_go": len(SCORES),
    "load_done": len(VALUES),
}


def check(queries: list[int], drop: set = frozenset(), ready: bool = True) -> int:
    loads = Loads(queries)
    roles = [
        *(score_warp(name, loads, drop, ready) for name in SCORES),
        *(value_warp(name, loads, drop) for name in VALUES),
        *(copies(name, slot, loads) for name in VALUES for slot in range(STAGES)),
    ]
    return explore(roles, lambda name: ARRIVALS.get(name[0], 1))


@pytest.mark.parametrize("queries", [[4], [1, 1, 1], [0, 3]], ids=str)
def test_every_interleaving_is_safe(queries):
    assert check(queries) > 100


def test_late_tiles_are_safe():
    assert check([2, 1], ready=False) > 100


@pytest.mark.parametrize(
    "dropped",
    [
        ("score", "full"),
        ("score", "scores_done"),
        ("score", "named"),
        ("left", "probabilities_stored"),
        ("right", "load_done"),
    ],
    ids="-".join,
)
def test_what_each_wait_is_for(dropped):
    with pytest.raises(Violation):
        check([3, 2], {dropped})
