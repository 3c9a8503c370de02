"""An explicit-state search over all interleavings of a kernel's roles.

A role (a warp, or a copy engine) is a straight line of steps: what it waits for, reads, writes and
arrives at follows from a part's pieces, not from data. A state is thus where each role stands, and
what barriers and buffers hold follows from it.

Barriers are mbarriers: a phase completes with its last arrival, and a wait tells the parity of the
running phase alone. Buffers have no order of their own: what is read must be what was written last,
by its number, and nobody may write meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

Name = Hashable  # of a barrier or buffer: ("full", 2)


class Violation(AssertionError):
    """Something that may not happen can, with the steps that lead to it."""


@dataclass
class Step:
    """Waits, ends accesses, arrives, begins accesses: in this order, at once."""

    wait: tuple[Name, int] | None = None  # barrier, round: phase 0 completes first
    ends: list[Name] = field(default_factory=list)
    arrives: list[Name] = field(default_factory=list)
    begins: list[tuple[Name, int | None]] = field(default_factory=list)  # version; None: a write


class Role:
    """One warp, as it is written down.

    An access lasts from where it is named to where its end is: longer than the real one, which
    hides nothing.
    """

    def __init__(self, name: str, dropped: Iterable[tuple[str, str]] = ()) -> None:
        """dropped: (role's kind, barrier) whose waits are left out, to see that they are needed."""
        self.name = name
        self.steps: list[Step] = []
        self._dropped = {barrier for kind, barrier in dropped if name.startswith(kind)}
        self._rounds: dict[Name, int] = {}

    def wait(self, barrier: Name, round: int) -> None:
        if barrier[0] not in self._dropped:  # type: ignore[index]
            self.steps.append(Step(wait=(barrier, round)))

    def arrive(self, *barriers: Name) -> None:
        for barrier in barriers:
            step = self._open(lambda step, b=barrier: not step.begins and b not in step.arrives)
            step.arrives.append(barrier)

    def read(self, version: int, *buffers: Name) -> None:
        """version: how many writes to each there have been."""
        self._open(lambda step: True).begins += [(buffer, version) for buffer in buffers]

    def write(self, *buffers: Name) -> None:
        self._open(lambda step: True).begins += [(buffer, None) for buffer in buffers]

    def end(self, *buffers: Name) -> None:
        self._open(lambda step: not step.begins and not step.arrives).ends += buffers

    def meet(self, barrier: Name) -> None:
        """A named barrier: everybody arrives and waits."""
        round = self._rounds[barrier] = self._rounds.get(barrier, -1) + 1
        self.arrive(barrier)
        self.wait(barrier, round)

    def _open(self, fits: Callable[[Step], bool]) -> Step:
        if not self.steps or not fits(self.steps[-1]):
            self.steps.append(Step())
        return self.steps[-1]


def explore(roles: list[Role], arrivals: Callable[[Name], int]) -> int:
    """The number of states that can be reached.

    Args:
        arrivals: how many complete a phase of a barrier.

    Raises:
        Violation: a deadlock; a buffer is written while it is accessed, or not read as it was
            meant; a wait ends with another phase than its own, or its phase is past.
    """
    active, arrived, written = zip(*map(_prefixes, roles), strict=True)
    start = (0,) * len(roles)
    came_from: dict[tuple[int, ...], tuple[tuple[int, ...], int] | None] = {start: None}
    queue = deque([start])
    arrived_at, written_to = _by_name(arrived), _by_name(written)
    phase_size = {name: arrivals(name) for name in arrived_at}

    def count(of: dict[Name, list[tuple[int, list[int]]]], name: Name, at: tuple[int, ...]) -> int:
        return sum(counts[at[i]] for i, counts in of.get(name, ()))

    def fail(what: str, state: tuple[int, ...], role: int) -> Violation:
        path, at = [f"{roles[role].name} at step {state[role]}: {what}"], came_from[state]
        while at is not None and len(path) < 40:
            before, mover = at
            path.append(f"  {roles[mover].name}: {roles[mover].steps[before[mover]]}")
            at = came_from[before]
        return Violation("\n".join([path[0], "last steps before it:", *path[1:][::-1]]))

    while queue:
        state = queue.popleft()
        stuck = True
        for i, at in enumerate(state):
            if at == len(roles[i].steps):
                continue
            step = roles[i].steps[at]
            if step.wait is not None:
                name, round = step.wait
                complete = count(arrived_at, name, state) // phase_size.get(name, 1)
                if complete > round + 1:
                    raise fail(f"phase {round} of {name} is past", state, i)
                if (complete & 1) == (round & 1):
                    continue
                if complete < round + 1:
                    raise fail(f"phase {round} of {name} is taken for {complete - 1}", state, i)
            stuck = False
            after = (*state[:i], at + 1, *state[i + 1 :])
            for name, version in step.begins:
                for j, other in enumerate(state):
                    mode = active[j][other].get(name) if j != i else None
                    if mode == "write" or (mode == "read" and version is None):
                        raise fail(f"{name} meets {roles[j].name}, which {mode}s it", state, i)
                found = count(written_to, name, after)
                if version is not None and found != version:
                    raise fail(f"reads {name} after {found} writes, not {version}", state, i)
            if after not in came_from:
                came_from[after] = state, i
                queue.append(after)
        if stuck and any(at < len(role.steps) for at, role in zip(state, roles, strict=True)):
            waiting = next(i for i, at in enumerate(state) if at < len(roles[i].steps))
            wait = roles[waiting].steps[state[waiting]].wait
            raise fail(f"deadlock, waits for {wait}", state, waiting)
    return len(came_from)


def _by_name(
    totals: Iterable[dict[Name, list[int]]],
) -> dict[Name, list[tuple[int, list[int]]]]:
    """Of each name the roles that count it, with their counts."""
    found: dict[Name, list[tuple[int, list[int]]]] = {}
    for role, counts_of in enumerate(totals):
        for name, counts in counts_of.items():
            found.setdefault(name, []).append((role, counts))
    return found


def _prefixes(
    role: Role,
) -> tuple[list[dict[Name, str]], dict[Name, list[int]], dict[Name, list[int]]]:
    """At each place of a role: what it accesses; how often it arrived at and wrote what."""
    active: list[dict[Name, str]] = [{}]
    arrived: dict[Name, list[int]] = {}
    written: dict[Name, list[int]] = {}
    for n, step in enumerate(role.steps):
        now = dict(active[-1])
        for totals in (arrived, written):
            for counts in totals.values():
                counts.append(counts[-1])
        for name in step.ends:
            if now.pop(name) == "write":
                written.setdefault(name, [0] * (n + 2))[-1] += 1
        for name in step.arrives:
            arrived.setdefault(name, [0] * (n + 2))[-1] += 1
        for name, version in step.begins:
            now[name] = "write" if version is None else "read"
        active.append(now)
    return active, arrived, written
