"""What the Flax nnx and linen modules have in common: how they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jax_flashmla import PagedCache, Peers, Slots, SplitSchedule, _checks
from jax_flashmla.layers.absorb import AbsorbedWeights
from jax_flashmla.layers.config import MLAConfig
from jax_flashmla.layers.decode import decode
from jax_flashmla.layers.indexer import Selection, select
from jax_flashmla.layers.params import MLAParams, check_layer
from jax_flashmla.layers.prefill import prefill
from jax_flashmla.layers.project import manual_axis

if TYPE_CHECKING:
    from jax.typing import DTypeLike


class MLACalls:
    """The calls of a module: `decode`, `prefill` and `select` with its own parameters.

    Attributes:
        config: the layer.
        dtype: of the computation; x's if None.
        heads_axis: the mesh axis that splits heads, or None.
        peers: what `decode` sums over that axis with: see `jax_flashmla.layers.decode`.
        params: the parameters' arrays; one device's share inside a `jax.shard_map`.
    """

    config: MLAConfig
    dtype: DTypeLike | None
    heads_axis: str | None
    peers: Peers | None
    if TYPE_CHECKING:

        @property
        def params(self) -> MLAParams: ...

    def decode(
        self,
        x: jax.Array,
        cache: PagedCache,
        *,
        slots: Slots,
        layer: int | jax.Array | None = None,
        schedule: SplitSchedule | None = None,
        absorbed: AbsorbedWeights | None = None,
        selection: Selection | None = None,
        context_axis: str | None = None,
        implementation: str | None = None,
    ) -> tuple[PagedCache, jax.Array]:
        """A few new tokens per sequence: see `jax_flashmla.layers.decode`."""
        return decode(
            self.config,
            self.params,
            _cast(x, self.dtype),
            cache,
            slots=slots,
            layer=layer,
            schedule=schedule,
            absorbed=absorbed,
            selection=selection,
            heads_axis=manual_axis(self.heads_axis),
            peers=self.peers if manual_axis(self.heads_axis) else None,
            context_axis=context_axis,
            implementation=implementation,
        )

    def prefill(
        self,
        x: jax.Array,
        cache: PagedCache,
        *,
        slots: Slots,
        layer: int | jax.Array | None = None,
        prefix: bool = True,
        selection: Selection | None = None,
        context_axis: str | None = None,
        implementation: str | None = None,
    ) -> tuple[PagedCache, jax.Array]:
        """A prompt or a chunk of it: see `jax_flashmla.layers.prefill`."""
        return prefill(
            self.config,
            self.params,
            _cast(x, self.dtype),
            cache,
            slots=slots,
            layer=layer,
            prefix=prefix,
            selection=selection,
            heads_axis=manual_axis(self.heads_axis),
            context_axis=context_axis,
            implementation=implementation,
        )

    def select(
        self,
        x: jax.Array,
        cache: PagedCache,
        *,
        slots: Slots,
        layer: int | jax.Array | None = None,
        prefix: bool = True,
        context_axis: str | None = None,
        implementation: str | None = None,
    ) -> tuple[PagedCache, Selection]:
        """The tokens that the new ones attend to: see `jax_flashmla.layers.select`."""
        return select(
            self.config,
            self.params,
            _cast(x, self.dtype),
            cache,
            slots=slots,
            layer=layer,
            prefix=prefix,
            heads_axis=manual_axis(self.heads_axis),
            context_axis=context_axis,
            implementation=implementation,
        )


def check_module(config: Any, dtype: Any, param_dtype: Any, heads_axis: Any, peers: Any) -> None:
    """Checks what both modules are made with."""
    check_layer(config, param_dtype=param_dtype, **({} if dtype is None else {"dtype": dtype}))
    if not isinstance(heads_axis, str | None):
        raise TypeError(f"heads_axis must be a mesh axis's name or None, got {heads_axis!r}")
    if not isinstance(peers, Peers | None):
        raise TypeError(f"peers must be Peers or None, got {type(peers).__name__}")


def _cast(x: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    _checks.refuse_foreign("x", x, "[b, s, hidden_size]")
    return x if dtype is None else x.astype(dtype)
