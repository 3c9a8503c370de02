"""What the demo decodes: lengths of the prompts, size of the model, number of steps."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_flashmla._limits import INT32_MAX, MAX_BATCH

DEFAULT_BATCH = 8
MAX_DRAWN_LENGTH = 1024  # tokens
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Workload:
    """A ragged batch of prompts and what is decoded from it."""

    lengths: tuple[int, ...]  # tokens of each prompt; 0 is allowed
    heads: int = 16
    layers: int = 4
    steps: int = 32
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("lengths must name at least one sequence")
        if min(self.lengths) < 0:
            raise ValueError(f"lengths must not be negative, got {min(self.lengths)}")
        for name in ("heads", "layers", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch > MAX_BATCH:
            raise ValueError(f"batch must be at most {MAX_BATCH}, got {self.batch}")
        for what, count in (
            (
                "layers * batch * (longest length + steps)",
                self.layers * self.batch * self.max_tokens,
            ),
            ("batch * heads", self.batch * self.heads),
        ):
            if count > INT32_MAX:
                raise ValueError(f"{what} must be at most {INT32_MAX}, got {count}")

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def max_tokens(self) -> int:
        """Of the longest sequence after the last step."""
        return max(self.lengths) + self.steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the demo's options."""
    parser.add_argument(
        "--batch", type=int, help=f"sequences, default {DEFAULT_BATCH}, or as many as lengths"
    )
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths",
        metavar="5,300,...",
        help="prompt lengths in tokens; default: drawn from --seed",
    )
    lengths.add_argument(
        "--lengths-file",
        type=Path,
        metavar="FILE",
        help="prompt lengths, separated by commas or white space; # begins a comment",
    )
    parser.add_argument("--heads", type=int, default=Workload.heads, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=Workload.layers, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=Workload.steps, help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=Workload.dtype)
    parser.add_argument("--seed", type=_seed, default=Workload.seed, help="default %(default)s")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^31 - 1, got {text!r}")
    return int(text)


def from_arguments(arguments: argparse.Namespace) -> Workload:
    """The workload that the options ask for.

    Raises:
        OSError: the file of lengths cannot be read.
        ValueError: an option's value makes no sense, or --batch contradicts the lengths.
    """
    if arguments.lengths is not None:
        lengths = parse_lengths(arguments.lengths)
    elif arguments.lengths_file is not None:
        lengths = parse_lengths(arguments.lengths_file.read_text())
    else:
        batch = DEFAULT_BATCH if arguments.batch is None else arguments.batch
        lengths = draw_lengths(batch, arguments.seed)
    if arguments.batch not in (None, len(lengths)):
        raise ValueError(f"batch is {arguments.batch}, but {len(lengths)} lengths are given")
    return Workload(
        lengths=lengths,
        heads=arguments.heads,
        layers=arguments.layers,
        steps=arguments.steps,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )


def parse_lengths(text: str) -> tuple[int, ...]:
    """Integers separated by commas or white space; what follows a # in its line is a comment."""
    text = re.sub(r"#.*", "", text)
    words = [word for word in re.split(r"[\s,]+", text) if word]
    for word in words:
        if not re.fullmatch(r"-?\d+", word):
            raise ValueError(f"lengths must be integers, got {word!r}")
    return tuple(int(word) for word in words)


def draw_lengths(batch: int, seed: int) -> tuple[int, ...]:
    """Prompt lengths as ragged as real ones: log-normal around 150 tokens, at most 1024."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    drawn = np.random.default_rng(seed).lognormal(mean=5.0, sigma=1.0, size=batch)
    return tuple(int(n) for n in np.clip(drawn, 1, MAX_DRAWN_LENGTH))
