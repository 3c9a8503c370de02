"""What a layer's decoding step costs on how many devices: the model of docs/scaling.md.

Times are in us, sizes in bytes, rates in bytes or operations a us. Attention layers alone: experts,
norms and embeddings are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

HOST = 8  # devices that reach each other's memory
ITEMSIZE = 2  # of weights and of what is exchanged


@dataclass(frozen=True)
class Card:
    """What was measured of a card. Sources: docs/scaling.md."""

    name: str
    memory: float
    weights: float  # bytes/us at which weights are read
    cache: float  # and a dense cache, by dense_decode
    gather: float  # and selected rows, by sparse_decode
    keys: float  # and index keys, by index_scores
    dense: float  # operations/us of dense_decode
    sparse: float  # and of sparse_decode


H100 = Card("H100", 80e9, 3.2e6, 2.97e6, 2.37e6, 2.85e6, 620e6, 385e6)
_FASTER = 4.58 / 3.2  # memory of an H200; the same chip
H200 = Card("H200", 141e9, *(_FASTER * x for x in (3.2e6, 2.97e6, 2.37e6, 2.85e6)), 660e6, 385e6)
CARDS = {card.name: card for card in (H100, H200)}


@dataclass(frozen=True)
class Model:
    """A model's attention layers."""

    name: str
    layers: int = 61
    hidden: int = 7168
    heads: int = 128
    rank: int = 1536
    row: int = 1152  # bytes of a cached token in a layer
    index_heads: int = 0
    topk: int = 0
    index_row: int = 0

    def weights(self, split: int) -> int:
        """Bytes of a layer's weights on a device that has 1 / split of the heads."""
        down = self.hidden * (self.rank + 576)
        a_head = self.rank * 192 + 512 * 256 + 128 * self.hidden
        indexer = 0
        if self.topk:  # not split: every device selects for itself
            indexer = self.rank * 128 * self.index_heads + self.hidden * (
                128 + 2 * self.index_heads
            )
        return ITEMSIZE * (down + self.heads // split * a_head + indexer)


V3 = Model("DeepSeek V3")
V32 = Model("DeepSeek V3.2", row=656, index_heads=64, topk=2048, index_row=132)


@dataclass(frozen=True)
class Layout:
    """Devices of each axis: heads are split over one, sequences over one, a sequence's tokens over
    one."""

    heads: int = 1
    batch: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        return self.heads * self.batch * self.context

    def __str__(self) -> str:
        return f"{self.heads} x {self.batch} x {self.context}"


# What products lose below the bandwidth, and the small operations between the kernels.
REST, REST_OF_SEQUENCE = 32.0, 0.3
KERNEL = 6.0  # an attention kernel with its merge, besides bytes or operations
SELECT, SELECT_OF_TOKEN = 10.0, 6.7e-6
# A sum over devices of one host: over peer memory, or XLA's.
PEERS, PEERS_OF_DEVICE, SECOND_ROUND, PEERS_RATE = 1.3, 0.65, 1.6, 270e3
SKEW = 3.0  # and how far apart devices come to it, within a step
PEERS_MOST = 2 * 1024 * 1024  # bytes; MAX_SUM_BYTES in jax_flashmla/_limits.py
ONE_ROUND_BYTES = 448 * 1024  # kSecondRoundBytes in csrc/sm90/all_reduce_sum/config.h
PSUM, PSUM_RATE = 21.0, 115e3
EXCHANGE_MOST = 4 * 1024 * 1024  # bytes; MAX_EXCHANGE_BYTES in jax_flashmla/_limits.py
MERGE = 2.0  # of partial results, by XLA


def sum_time(bytes: float, devices: int, kind: str = "peers") -> float:
    """A sum of so many bytes over the devices of a host."""
    if devices == 1 or kind == "none":
        return 0.0
    if kind == "psum" or bytes > PEERS_MOST:
        return PSUM + bytes / PSUM_RATE
    start = PEERS + PEERS_OF_DEVICE * devices
    one_round, two_rounds = (devices - 1) * bytes, 2 * (devices - 1) * bytes / devices
    if one_round - two_rounds <= ONE_ROUND_BYTES:
        return start + one_round / PEERS_RATE
    return start + SECOND_ROUND + two_rounds / PEERS_RATE


def exchange_time(bytes: float, devices: int, kind: str) -> float:
    """A sum within a step, which devices do not reach at the same time."""
    alone = sum_time(bytes, devices, kind)
    over_peers = devices > 1 and kind == "peers" and bytes <= PEERS_MOST
    return alone + SKEW if over_peers else alone


def send_time(bytes: float, devices: int, kind: str) -> float:
    """So many bytes from each device to each other one, in one kernel over peers or by XLA."""
    if kind == "peers" and devices * bytes <= EXCHANGE_MOST:
        return PEERS + PEERS_OF_DEVICE * devices + (devices - 1) * bytes / PEERS_RATE
    return PSUM + (devices - 1) * bytes / PSUM_RATE


def context_time(b: float, heads: int, devices: int, kind: str, heads_split: bool = False) -> float:
    """Merging attention to devices' shares of the tokens (jax_flashmla/context.py).

    Args:
        heads: that each device attends with.
        kind: "peers" or "psum", which stands for any of XLA's collectives.
        heads_split: whether a device has but its share of them before and after.
    """
    if devices == 1:
        return 0.0
    results = b * heads * (512 * ITEMSIZE + 4)  # and their lse
    few = devices * results <= EXCHANGE_MOST
    over_peers = few and kind == "peers"
    behind = MERGE + SKEW if over_peers else MERGE
    if heads_split:
        queries = b * heads / devices * 576 * ITEMSIZE
        sent = results / devices if over_peers or not few else results
        calls = 1 if few else 2  # XLA exchanges results and lse by themselves, but gathers both
        return send_time(queries, devices, kind) + calls * send_time(sent, devices, kind) + behind
    if few or devices <= 4:
        return send_time(results, devices, kind) + behind
    summed = 4 * b * heads * 512  # in float32, weighted by the lse of all
    lses = exchange_time(4 * b * heads * devices, devices, kind)
    return lses + exchange_time(summed, devices, kind) + MERGE


def attention_time(card: Card, model: Model, heads: int, b: float, tokens: float) -> float:
    """Attention kernels of one device; of the indexer too."""
    attended = min(tokens, model.topk) if model.topk else tokens
    bytes, operations = b * attended * model.row, 2176 * b * heads * attended
    if not model.topk:
        return KERNEL + max(bytes / card.cache, operations / card.dense)
    scores = b * tokens * model.index_row / card.keys
    select = SELECT + b * tokens * SELECT_OF_TOKEN
    return scores + select + KERNEL + 2 + max(bytes / card.gather, operations / card.sparse)


def layer_time(
    card: Card, model: Model, layout: Layout, b: int, tokens: int, sums: str = "peers"
) -> dict[str, float]:
    """The parts of one layer's step, and their sum as "layer".

    Args:
        b: sequences of all devices together.
        tokens: cached tokens of each.
        sums: "peers", "psum" or "none".
    """
    mine, heads = math.ceil(b / layout.batch), model.heads // layout.heads
    parts = {
        "weights": model.weights(layout.heads) / card.weights,
        "rest": REST + REST_OF_SEQUENCE * mine,
        "attention": attention_time(card, model, heads, mine, tokens / layout.context),
        "heads": exchange_time(mine * model.hidden * ITEMSIZE, layout.heads, sums),
        "context": context_time(mine, heads, layout.context, sums),
    }
    return parts | {"layer": sum(parts.values())}


def memory(card: Card, model: Model, layout: Layout, b: int, tokens: int) -> tuple[float, float]:
    """Bytes of a device: weights of all attention layers, and the cache."""
    mine = math.ceil(b / layout.batch) * tokens / layout.context
    cache = mine * (model.row + model.index_row) * model.layers
    return model.weights(layout.heads) * model.layers, cache


def layouts(devices: int) -> Iterator[Layout]:
    """Those of so many devices whose heads and tokens are split within a host."""
    for heads in (1, 2, 4, 8):
        for context in (1, 2, 4, 8):
            if heads * context <= min(HOST, devices):
                yield Layout(heads, devices // (heads * context), context)


def best_layout(
    card: Card, model: Model, devices: int, b: int, tokens: int, spared: float = 0.0
) -> Layout | None:
    """The fastest whose weights and cache fit what a device has besides `spared` bytes.

    None where none does. Sequences are not split over more devices than there are of them.
    """
    found = [
        layout
        for layout in layouts(devices)
        if layout.batch <= b
        and sum(memory(card, model, layout, b, tokens)) + spared <= 0.9 * card.memory
    ]

    def layer_us(layout: Layout) -> float:
        return layer_time(card, model, layout, b, tokens)["layer"]

    return min(found, key=layer_us, default=None)


def tokens_per_second(model: Model, layer_us: float, b: int) -> float:
    """New tokens of all sequences together, counting attention layers alone."""
    return b / (model.layers * layer_us) * 1e6
