"""Generates text with a DeepSeek-architecture checkpoint in Hugging Face's format.

    python examples/generate.py --checkpoint DIR --prompt "The capital of France is"

DIR holds config.json, model.safetensors (or shards and their index) and tokenizer.json, or Kimi
K2's tiktoken.model; without either, and with a vocabulary of 256, tokens are bytes. Architectures:
deepseek_v2, deepseek_v3 (R1, V3.1), deepseek_v32, kimi_k2, glm4_moe_lite, glm_moe_dsa (GLM-5).
V3.2 and GLM-5 attend sparsely, to the tokens that their indexers select; --cache-format v32 keeps
the latents in fp8. Runs on a CPU and, unchanged, on a Hopper GPU.

Several prompts (--prompt again, or a line each of --prompts-file) are decoded together, --batch at
a time; those with equal beginnings share the blocks of the cache that hold them. --speculate N
verifies up to N tokens ahead in one step, drafted from what the text has said before; it changes no
token. Text is printed as it comes, in the prompts' order; speeds go to standard error.

--devices N splits the heads, the MLPs and the head over the vocabulary over N GPUs of this host, or
as many CPU devices as JAX_NUM_CPU_DEVICES says. Each has the whole cache. MLPs and experts that the
checkpoint stores in float8 stay in it, other weights are kept in --dtype: V3.2's are 91 GB on each
of 8 GPUs.

Needs: pip install 'jax-flashmla[flax,hf]'; for tiktoken.model, tiktoken
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Iterable, Sequence

from deepseek.interrupt import exit_on_ctrl_c

if __name__ == "__main__":
    exit_on_ctrl_c("generate")

import jax.numpy as jnp

from deepseek.config import ModelConfig
from deepseek.devices import connect
from deepseek.serve import Server, Token
from deepseek.tokenizer import TextStream, Tokenizer, load_tokenizer
from deepseek.weights import load_model
from jax_flashmla.serve import NGramDraft, Sampling, Stats


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts-file", type=pathlib.Path, help="a prompt on each line")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument(
        "--cache-blocks",
        type=int,
        help="blocks of 64 tokens in the cache; by default enough for --batch of the longest",
    )
    parser.add_argument(
        "--cache-format",
        choices=("dense", "v32"),
        default="dense",
        help="of the cache's rows: dense (default), or v32: latents in fp8",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="tokens to draft for each step from the text so far; 0, the default: none",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0, the default: all tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop-token",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help="ends a text, beside those that the checkpoint names; may be repeated",
    )
    parser.add_argument(
        "--stop-string",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends a text with the token that completes it; may be repeated",
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="to split the model over (default: 1)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokenizer", choices=("auto", "bytes"), default="auto")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace, config: ModelConfig) -> None:
    """Refuses options that are out of range or that do not fit the model or each other."""
    if arguments.speculate < 0:
        raise ValueError(f"--speculate must be at least 0, got {arguments.speculate}")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if arguments.cache_blocks is not None and arguments.cache_blocks < 1:
        raise ValueError(f"--cache-blocks must be at least 1, got {arguments.cache_blocks}")
    if arguments.cache_format != "dense" and arguments.dtype == "float32":
        raise ValueError(
            "--dtype must be bfloat16 or float16 with --cache-format "
            f"{arguments.cache_format}, got float32"
        )
    row = config.attention.kv_lora_rank, config.attention.qk_rope_head_dim
    if arguments.cache_format == "v32" and row != (512, 64):
        raise ValueError(
            "--cache-format v32 takes models of kv_lora_rank 512 and qk_rope_head_dim 64, got "
            f"{row[0]} and {row[1]}"
        )


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts_file:
        prompts += read_lines(arguments.prompts_file)
    if not prompts:
        raise ValueError("there must be a prompt: --prompt TEXT or --prompts-file FILE")
    return prompts


def read_lines(path: pathlib.Path) -> list[str]:
    """A file's lines. Only a line feed ends one: other separators may be part of a prompt."""
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be in UTF-8: {error}") from None
    lines = [line.removesuffix("\r") for line in lines]
    if "" in lines:
        raise ValueError(
            f"{path} must have a prompt on each line, line {lines.index('') + 1} is empty"
        )
    return lines


def encode(prompts: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for i, tokens in enumerate(encoded):
        if tokens and max(tokens) >= vocab_size:
            raise ValueError(
                f"prompt {i} has the token {max(tokens)}, the model's vocabulary only "
                f"{vocab_size} tokens"
            )
    return encoded


def print_in_order(
    tokens: Iterable[Token],
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    stop_tokens: frozenset[int],
) -> None:
    """Streams the first text that has not ended; what comes of the others waits for its turn."""
    streams = [TextStream(tokenizer) for _ in prompts]
    unprinted = list(prompts)
    ended = [False] * len(prompts)
    front = 0
    for token in tokens:
        if token.id not in stop_tokens:
            unprinted[token.prompt] += streams[token.prompt].add(token.id)
        if token.last:
            unprinted[token.prompt] += streams[token.prompt].end() + "\n"
            ended[token.prompt] = True
        while front < len(prompts):
            print(unprinted[front], end="", flush=True)
            unprinted[front] = ""
            if not ended[front]:
                break
            front += 1


def summary(stats: Stats) -> str:
    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens / seconds:,.1f} tokens/s" if seconds else "all of it compiling"

    parts = [f"prefill: {rate(stats.prompt_tokens, stats.prefill_seconds)}"]
    if stats.cached_tokens:
        parts.append(f"{stats.cached_tokens} tokens of prompts were in the cache already")
    parts.append(
        f"decoding, at most {stats.most_active} sequences at a time: "
        f"{rate(stats.decoded_tokens, stats.decode_seconds)}"
    )
    if stats.drafted_tokens:
        parts.append(f"{stats.accepted_tokens} of {stats.drafted_tokens} drafted tokens accepted")
    parts.append(f"apart from {stats.compile_seconds:.1f} s in steps that were compiled first")
    return "; ".join(parts)


def run(arguments: argparse.Namespace) -> None:
    config = ModelConfig.from_directory(arguments.checkpoint)
    check(arguments, config)
    peers = connect(arguments.devices, config)
    prompts = read_prompts(arguments)
    tokenizer = load_tokenizer(arguments.checkpoint, arguments.tokenizer, config.vocab_size)
    prompt_tokens = encode(prompts, tokenizer, config.vocab_size)
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    dtype = jnp.dtype(arguments.dtype)
    stop_tokens = config.stop_tokens | set(arguments.stop_token)
    model = load_model(
        arguments.checkpoint, config, dtype=dtype, peers=peers, progress=sys.stderr.isatty()
    )
    server = Server(
        config,
        model,
        batch=min(arguments.batch, len(prompts)),
        max_tokens=min(
            max(map(len, prompt_tokens)) + arguments.max_new_tokens, config.max_positions
        ),
        num_blocks=arguments.cache_blocks,
        dtype=dtype,
        cache_format=arguments.cache_format,
        sampling=sampling,
        stop_tokens=stop_tokens,
        stop_strings=arguments.stop_string,
        detokenize=tokenizer.decode,
        draft=NGramDraft(length=arguments.speculate) if arguments.speculate else None,
    )
    tokens = server.generate(prompt_tokens, arguments.max_new_tokens)
    print_in_order(tokens, prompts, tokenizer, stop_tokens)
    print(summary(server.stats), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (OSError, ValueError, NotImplementedError, ImportError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
