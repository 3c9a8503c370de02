"""Paged multi-head latent attention (MLA) decoding for JAX, on CPUs and on Hopper GPUs."""

from jax_flashmla import _interrupt as _interrupt  # isort: skip (first: JAX takes a second to import)
from jax_flashmla._decode_refusal import kernel_refusal
from jax_flashmla.cache.allocator import BlockAllocator, OutOfBlocks
from jax_flashmla.cache.copy import copy_blocks
from jax_flashmla.cache.format import CacheFormat
from jax_flashmla.cache.paged import PagedCache
from jax_flashmla.cache.quantise import dequantise, quantise
from jax_flashmla.cache.scheduler import Scheduler
from jax_flashmla.cache.table import BlockTable, Slots
from jax_flashmla.compat import flash_mla_sparse_fwd, flash_mla_with_kvcache, get_mla_metadata
from jax_flashmla.export import export_checks
from jax_flashmla.ops.all_reduce_sum import all_reduce_sum
from jax_flashmla.ops.cache_append import cache_append
from jax_flashmla.ops.dense_decode import dense_decode
from jax_flashmla.ops.index_append import index_append
from jax_flashmla.ops.index_scores import index_scores
from jax_flashmla.ops.index_topk import index_topk
from jax_flashmla.ops.latent_append import latent_append
from jax_flashmla.ops.make_schedule import SplitSchedule, make_schedule
from jax_flashmla.ops.merge import merge_lse
from jax_flashmla.ops.project import project
from jax_flashmla.ops.project_twice import project_twice
from jax_flashmla.ops.sparse_decode import sparse_decode
from jax_flashmla.ops.sparse_prefill import sparse_prefill
from jax_flashmla.peers import Peers, connect_peers
from jax_flashmla.sharding import decode_specs

__version__ = "0.2.0"

__all__ = [
    "BlockAllocator",
    "BlockTable",
    "CacheFormat",
    "OutOfBlocks",
    "PagedCache",
    "Peers",
    "Scheduler",
    "Slots",
    "SplitSchedule",
    "all_reduce_sum",
    "cache_append",
    "connect_peers",
    "copy_blocks",
    "decode_specs",
    "dense_decode",
    "dequantise",
    "export_checks",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "index_append",
    "index_scores",
    "index_topk",
    "kernel_refusal",
    "latent_append",
    "make_schedule",
    "merge_lse",
    "project",
    "project_twice",
    "quantise",
    "sparse_decode",
    "sparse_prefill",
]
