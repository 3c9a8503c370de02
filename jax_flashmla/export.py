"""What `jax.export` needs to be told of the operations."""

from __future__ import annotations

import jax.export

from jax_flashmla._xla import chain_call
from jax_flashmla._xla.operation import targets


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What to pass as `disabled_checks` to `jax.export.export` for functions that decode.

    jax.export takes custom calls only where the caller vouches that their contract is stable; the
    targets' names carry a version for that. jax_flashmla must be imported where the result is run.
    Extents must be known when exporting: symbolic ones raise NotImplementedError.
    """
    return [
        jax.export.DisabledSafetyCheck.custom_call(name) for name in [*targets(), chain_call.TARGET]
    ]
