"""What an operation gives to the benchmark. Imports neither JAX nor matplotlib."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jax_flashmla.bench.shape import Result

if TYPE_CHECKING:
    from jax_flashmla.bench.ahead import Lowered, Programs
    from jax_flashmla.bench.live import Torch
    from jax_flashmla.bench.setup import Setup


@dataclass(frozen=True)
class Grid:
    """Shapes that are measured together."""

    shapes: Callable[[], tuple[Any, ...]]
    layers: int | None = None  # calls in one jitted function where that is fixed


@dataclass(frozen=True)
class Axes:
    """How an operation's results are drawn; `x`, `series` and `size` name fields of a result."""

    x: str
    x_label: str
    series: str  # one colour for each of its values
    series_label: str
    panel: Callable[[Result], tuple[int, ...]]  # what the results of one panel share; sorts panels
    panel_title: Callable[[Result], str]
    preferred: Callable[[list[Result]], list[Result]]  # those that differ in x, series and panel
    kind: Callable[[Result], int]  # one marker of the roofline for each
    kind_label: str
    size: str
    size_label: str


@dataclass(frozen=True)
class Timed:
    """A compiled function with its arguments, and how often it calls the operation."""

    function: Any
    arguments: tuple[Any, ...]
    calls: int


@dataclass(frozen=True)
class Calls:
    """All that is timed of one shape."""

    kernel: Timed
    error: Callable[[Any], float]  # the kernel's result -> its relative error
    baselines: Mapping[str, Timed]  # "xla", "reference"
    # Where the limit is not modelled but measured: what is timed alone, and bytes read beside it.
    alone: Timed | None = None
    read_once: int = 0


class MakesCalls(Protocol):
    """A module that makes an operation's arrays and functions; it may import JAX."""

    TARGET: str  # of the operation's custom call
    MAX_RELATIVE_ERROR: float

    def memory(self, shape: Any, setup: Setup) -> int:
        """Bytes of device memory that measuring the shape takes, the pool included."""

    def make_pool(self, shapes: list[Any], setup: Setup) -> Any:
        """What all these shapes share, made once."""

    def programs(self, shape: Any, pool: Any, setup: Setup, *, with_xla: bool) -> Lowered:
        """All that the shape runs, with_xla its baselines too, lowered from abstract arguments.

        No array is made for it. Names: "kernel", those of baselines, whatever make_calls needs.
        """

    def make_calls(self, shape: Any, pool: Any, setup: Setup, programs: Programs) -> Calls:
        """The arrays of one shape, and its programs on them."""


class CallsPeer(Protocol):
    """A module that calls a peer which is timed in the same run."""

    def peer_calls(
        self, shape: Any, arguments: tuple[Any, ...], peer: Any
    ) -> list[Callable[[], Any]]:
        """One call over each cache, from the kernel's arguments; none where it takes no such shape.

        peer: what the operation's load_peer returns. A call returns what the operation's error
        takes: of attention [b, s_q, heads, d_v], padded heads included.
        """


@dataclass(frozen=True)
class Operation:
    """One operation of the benchmark."""

    name: str
    setting: str  # what all shapes have in common, for the title
    shape: Any  # its type of shape, a frozen dataclass
    grids: Mapping[str, Grid]
    default_grids: Mapping[str, str]  # platform -> name of a grid
    xla_shapes: tuple[Any, ...]  # at which plain XLA is timed too
    dtypes: tuple[str, ...]  # the first one is the default
    block_sizes: tuple[int, ...]
    peers: Callable[..., dict[str, float]]  # (shape, device_kind, dtype, block_size) -> us
    group: Callable[[Result], str]  # the kind of a measured shape, for the summary
    axes: Axes
    calls: Callable[[], MakesCalls]
    live_peer: Callable[[], CallsPeer] | None = None
    load_peer: Callable[[], Torch] | None = None  # by default live.load's, FlashMLA

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the shape's fields."""
        return tuple(self.shape.__dataclass_fields__)

    @property
    def defaults(self) -> Result:
        """Values of the fields that may be left out."""
        fields = dataclasses.fields(self.shape)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
