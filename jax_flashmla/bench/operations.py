"""The operations that can be measured: a new one is a folder and a line here."""

from __future__ import annotations

from jax_flashmla.bench import dense_decode, indexer, layer_step, sparse_decode, sparse_prefill
from jax_flashmla.bench.operation import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        dense_decode.OPERATION,
        sparse_decode.OPERATION,
        sparse_prefill.OPERATION,
        indexer.SCORES,
        indexer.TOPK,
        layer_step.OPERATION,
    )
}
DEFAULT = "dense_decode"
