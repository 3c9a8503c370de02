"""Writes tests/golden/ragged/*.npz: steps of a serving engine, by NumPy in float64.

python tests/golden/make_ragged.py. It shares no code with the package or the other tests: each
token is stored, and each query attended, by itself.

Values are multiples of 1/8 and small, so exact in 16 bits: inputs and caches are stored as
int8 codes of eighths. In a cache, code -128 stands for NaN: what nobody may read.
"""

from __future__ import annotations

import pathlib

import numpy as np

LATENT, ROPE, COLUMNS = 512, 64, 640
HEADS = 2
NAN = -128
SM_SCALE = 0.11

# Per sequence: tokens in the cache after the step, and how many of them are new. Sequences come as
# engines order them: those that decode, chunks, and the others; then slots that are not in use.
STEPS = {
    "decode": {"kv": [5, 16, 33, 1], "new": [1, 1, 1, 1], "kinds": [4, 4, 4]},
    "chunk_over_prefix": {"kv": [37, 20], "new": [6, 3], "kinds": [0, 2, 2]},
    "prefill": {"kv": [3, 17], "new": [3, 17], "kinds": [0, 2, 2]},
    "mixed": {"kv": [20, 3, 30, 5], "new": [1, 1, 7, 5], "kinds": [2, 3, 4]},
}
# Of every step, so that one compilation serves all of them: what is not in use is hostile.
TOKENS, SEQUENCES, PAGES, PAGES_PER_SEQUENCE, PAGE = 22, 6, 9, 4, 16


def main() -> None:
    folder = pathlib.Path(__file__).parent / "ragged"
    folder.mkdir(exist_ok=True)
    for seed, (name, step) in enumerate(STEPS.items()):
        np.savez_compressed(folder / f"{name}.npz", **make(np.random.default_rng(seed), **step))


def make(
    rng: np.random.Generator, kv: list[int], new: list[int], kinds: list[int]
) -> dict[str, np.ndarray]:
    n, page = len(kv), PAGE
    held = [-(-length // page) for length in kv]
    order = rng.permutation(PAGES)
    pages = [order[sum(held[:i]) : sum(held[: i + 1])] for i in range(n)]

    def codes(*shape: int) -> np.ndarray:
        return rng.integers(-6, 7, shape).astype(np.int8)

    q, rows = codes(TOKENS, HEADS, LATENT + ROPE), codes(TOKENS, LATENT + ROPE)
    cache = np.full((PAGES, page, COLUMNS), NAN, np.int8)
    for i in range(n):
        for t in range(kv[i] - new[i]):
            cache[pages[i][t // page], t % page, : LATENT + ROPE] = codes(LATENT + ROPE)
    before, first = cache.copy(), np.cumsum([0, *new])
    out = np.zeros((TOKENS, HEADS, LATENT))
    for i in range(n):
        for j in range(new[i]):
            t, token = kv[i] - new[i] + j, first[i] + j
            slot = cache[pages[i][t // page], t % page]
            slot[: LATENT + ROPE], slot[LATENT + ROPE :] = rows[token], 0
            seen = np.stack([cache[pages[i][s // page], s % page] for s in range(t + 1)]) / 8.0
            for head in range(HEADS):
                scores = seen[:, : LATENT + ROPE] @ (q[token, head] / 8.0) * SM_SCALE
                weights = np.exp(scores - scores.max())
                out[token, head] = weights @ seen[:, :LATENT] / weights.sum()

    unused = np.full(SEQUENCES - n, 2**30)
    rest = np.full(PAGES - sum(held), 2**30)
    table = np.full((SEQUENCES, PAGES_PER_SEQUENCE), 2**30)
    for i in range(n):
        table[i, : held[i]] = pages[i]
    return {
        "ql_nope": q[..., :LATENT],
        "q_pe": q[..., LATENT:],
        "new_kv_c": rows[:, :LATENT],
        "new_k_pe": rows[:, LATENT:],
        "cache": before,
        "kv_lens": np.concatenate([kv, unused]).astype(np.int32),
        "page_table": table.astype(np.int32),
        "page_list": np.concatenate([*pages, rest]).astype(np.int32),
        "cu_q_lens": np.concatenate([first, unused]).astype(np.int32),
        "cu_kv_lens": np.concatenate([np.cumsum([0, *held]) * page, unused]).astype(np.int32),
        "distribution": np.array(kinds, np.int32),
        "out": out.astype(np.float32),
        "cache_after": cache,
    }


if __name__ == "__main__":
    main()
