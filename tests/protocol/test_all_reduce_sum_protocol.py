"""The mailboxes of csrc/sm90/all_reduce_sum/kernel.cuh: devices that sum again and again.

A slot is filled by another device and emptied by its own: both are writes. A poll sees that the
slot was filled, and how often it has been stands in the barrier "filled". Slots of even and odd
epochs differ. Launches of other sizes give a slot to another thread, hence `thread_of`: it is the
ends of kernels that order a slot's accesses on its own device.
"""

from __future__ import annotations

import pytest

from protocol import Role, Violation, explore

THREADS = 2


def thread(
    rank: int, number: int, *, size: int, epochs: int, parities: int, ends: bool, rounds: int
) -> Role:
    role = Role(f"device{rank}.{number}")
    others = [other for other in range(size) if other != rank]
    for epoch in range(epochs):
        if epoch > 0 and ends:
            role.wait(("ended", rank), epoch - 1)
        slot, (use, parity) = (number + epoch // 2) % THREADS, divmod(epoch, parities)
        for round in range(rounds):
            for to in others:
                name = ("slot", to, round, rank, slot, parity)
                role.write(name)
                role.end(name)
                role.arrive(("filled", *name[1:]))
            for source in others:
                name = ("slot", rank, round, source, slot, parity)
                role.wait(("filled", *name[1:]), use)
                role.read(2 * use + 1, name)
                role.end(name)
                role.write(name)  # empty it
                role.end(name)
        role.arrive(("ended", rank))
    return role


def check(*, size: int, epochs: int, parities: int = 2, ends: bool = True, rounds: int = 1) -> int:
    roles = [
        thread(rank, number, size=size, epochs=epochs, parities=parities, ends=ends, rounds=rounds)
        for rank in range(size)
        for number in range(THREADS)
    ]
    return explore(roles, lambda name: THREADS if name[0] == "ended" else 1)


@pytest.mark.parametrize(("rounds", "epochs"), [(1, 4), (2, 3)])
def test_a_slot_is_empty_when_it_is_filled_again(rounds: int, epochs: int) -> None:
    assert check(size=2, epochs=epochs, rounds=rounds) > 100


def test_one_set_of_slots_would_not_do() -> None:
    """A device that is ahead would fill what the other has not emptied."""
    with pytest.raises(Violation, match="slot"):
        check(size=2, epochs=3, parities=1)


def test_a_launch_that_begins_before_the_last_one_ended_would_not_do() -> None:
    """As programmatic dependent launch lets it."""
    with pytest.raises(Violation, match=r"slot|filled"):
        check(size=2, epochs=4, ends=False)
