"""Rewrites the tables of docs/scaling.md from scripts/scaling_model.py and measured results.

    python scripts/scaling_doc.py            # after new constants or results
    python scripts/scaling_doc.py --check    # exit status 1 if the page is not what it would be

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # where it is imported by its path

from performance_doc import RESULTS, ROOT
from performance_tables import markdown, number, tokens
from scaling_model import (
    CARDS,
    H100,
    H200,
    V3,
    V32,
    Card,
    Layout,
    Model,
    attention_time,
    best_layout,
    context_time,
    layer_time,
    memory,
    sum_time,
    tokens_per_second,
)

PAGE = ROOT / "docs" / "scaling.md"
TABLE = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
EXPERTS = 656e9  # bytes of DeepSeek V3.2's experts in fp8, over all devices
OTHER = 6e9  # embeddings, dense layers, XLA's workspace, on each


def documents(pattern: str) -> list[dict[str, Any]]:
    """Results of runs over several devices, those of fewer processes first."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob(f"*/parallel/{pattern}")]
    return sorted(found, key=lambda document: (document["processes"], document["date"]))


def runs(part: str) -> Iterator[tuple[Card, dict[str, Any], dict[str, Any]]]:
    """Measured by benchmarks/bench_parallel.py: the card, the document, a result."""
    for document in documents("*.json"):
        name = document["hardware"]["device"]
        card = next(card for card in CARDS.values() if card.name in name)
        for result in document.get("results", ()):
            if result["part"] == part:
                yield card, document, result


def constants() -> str:
    fields = {
        "weights": ("read weights", "TB/s", 1e6),
        "cache": ("`dense_decode` reads the cache", "TB/s", 1e6),
        "gather": ("`sparse_decode` gathers rows", "TB/s", 1e6),
        "keys": ("`index_scores` reads keys", "TB/s", 1e6),
        "dense": ("`dense_decode` multiplies", "TFLOP/s", 1e6),
        "sparse": ("`sparse_decode` multiplies", "TFLOP/s", 1e6),
    }
    lines = [
        [what, unit, *(number(getattr(card, name) / scale) for card in CARDS.values())]
        for name, (what, unit, scale) in fields.items()
    ]
    return markdown(["", "unit", *CARDS], lines)


def sums() -> str:
    """Sums alone, measured in one function, and by the model."""
    lines = []
    for card, document, result in runs("sums"):
        bytes, devices = result["b"] * V3.hidden * 2, result["devices"]
        lines.append(
            [
                card.name,
                str(document["processes"]),
                str(devices),
                str(result["b"]),
                number(result["psum_us"]),
                number(result["peers_us"]),
                number(sum_time(bytes, devices)),
            ]
        )
    header = ["card", "processes", "devices", "b", "`psum`", "over peers", "model of the kernel"]
    return markdown(header, lines)


def check() -> str:
    """Layers over heads: measured, and by the model."""
    lines = []
    for card, document, result in runs("tensor"):
        layout, b = Layout(heads=result["devices"]), result["b"]
        line = [card.name, str(document["processes"]), str(result["devices"]), str(b)]
        for kind in ("none", "psum", "peers"):
            model = layer_time(card, V3, layout, b, document["tokens"], kind)["layer"]
            line += [number(result[f"{kind}_us"]), number(model)]
        added = result["psum_us"] - result["none_us"], result["peers_us"] - result["none_us"]
        lines.append([*line, *(number(us) for us in added)])
    header = ["card", "processes", "devices", "b"]
    for kind in ("without a sum", "with `psum`", "over peers"):
        header += [kind, "model"]
    return markdown([*header, "`psum` adds", "peers add"], lines)


def data() -> str:
    lines = [
        [
            card.name,
            str(document["processes"]),
            str(result["devices"]),
            str(result["b"]),
            number(result["alone_us"]),
            number(layer_time(card, V3, Layout(), result["b"], document["tokens"])["layer"]),
            number(result["together_us"]),
            number(result["of_linear"]),
        ]
        for card, document, result in runs("data")
    ]
    header = "card, processes, devices, b of each, one alone, model, all together, of linear"
    return markdown(header.split(", "), lines)


def context_documents() -> Iterator[tuple[Card, dict[str, Any]]]:
    """Measured by benchmarks/bench_context.py."""
    for document in documents("*context*.json"):
        name = document["hardware"]["device"]
        yield next(card for card in CARDS.values() if card.name in name), document


def context_model(card: Card, shape: dict[str, Any]) -> float:
    """Microseconds of one layer's attention, with the tokens over devices."""
    b, size = shape["batch"], shape["devices"]
    kind = "peers" if shape["peers"] else "psum"
    attention = attention_time(card, V3, V3.heads, b, shape["tokens"] / size)
    return attention + context_time(b, V3.heads, size, kind, shape["heads_split"])


def context() -> str:
    lines = []
    for card, document in context_documents():
        shapes = document["shapes"]
        for shape in shapes:
            alike = [s for s in shapes if s["batch"] == shape["batch"]]
            alike = [s for s in alike if s["tokens"] == shape["tokens"]]
            alone = next(s["us"] for s in alike if s["devices"] == 1)
            if shape["devices"] == 1 or shape["peers"]:
                continue
            split = shape["heads_split"]
            numbers = shape["devices"], shape["batch"], tokens(shape["tokens"])
            line = [card.name, str(document["processes"]), *map(str, numbers)]
            line += ["split" if split else "all on each", number(alone)]
            same = [w for w in alike if w["devices"] == shape["devices"]]
            same = [w for w in same if w["heads_split"] == split]
            for peers in (False, True):
                way = next((w for w in same if w["peers"] == peers), None)
                if way is None:  # the run was cut off
                    line += ["", "", ""]
                else:
                    times = number(way["us"]), number(context_model(card, way))
                    line += [*times, number(alone / way["us"])]
            lines.append(line)
    header = "card, processes, devices, b, tokens, heads, one device"
    for way in ("XLA's", "over peers"):
        header += f", {way}, model, times one"
    return markdown(header.split(", "), lines)


def context_sizes() -> str:
    """By the model over 2, 4 and 8 devices: times one device, over peers and by XLA."""
    lines = []
    for card in CARDS.values():
        for length in (131072, 524288):
            alone = attention_time(card, V3, V3.heads, 1, length)
            line = [card.name, tokens(length), number(alone)]
            for size in (2, 4, 8):
                own = attention_time(card, V3, V3.heads, 1, length / size)
                for kind in ("peers", "psum"):
                    us = own + context_time(1, V3.heads, size, kind)
                    line.append(f"{number(us)} us, {number(alone / us)}")
            lines.append(line)
    header = "card, tokens, one device"
    for size in (2, 4, 8):
        header += f", {size} over peers, {size} by XLA"
    return markdown(header.split(", "), lines)


WORKLOADS = (
    (V3, 1, 131072),
    (V3, 32, 4096),
    (V3, 256, 4096),
    (V3, 8192, 4096),
    (V32, 64, 131072),
    (V32, 4096, 32768),
)


def devices() -> str:
    """The fastest layout on how many H100s: us a layer, and tokens/s of a device."""
    lines = []
    for count in (1, 2, 4, 8, 16, 64, 256, 1024):
        line = [str(count)]
        for model, b, length in WORKLOADS:
            layout = best_layout(H100, model, count, b, length)
            if layout is None:
                line.append("-")
                continue
            us = layer_time(H100, model, layout, b, length)["layer"]
            rate = tokens_per_second(model, us, b) / count
            line.append(f"{layout}: {number(us)} us, {number(rate)}/s")
        lines.append(line)
    titles = [f"{m.name}, b {b:,}, {tokens(length)}" for m, b, length in WORKLOADS]
    return markdown(["GPUs", *titles], lines)


def v32_on_two_nodes() -> str:
    """DeepSeek V3.2 on 16 H200s: each way to split heads within a node."""
    lines = []
    for b in (16, 64, 128, 256, 512, 1024, 2048):
        for length in (8192, 32768, 131072):
            line = [str(b), tokens(length)]
            fit = {}
            for heads in (8, 4, 2, 1):
                layout = Layout(heads, 16 // heads)
                us = layer_time(H200, V32, layout, b, length)["layer"]
                needed = sum(memory(H200, V32, layout, b, length)) + EXPERTS / 16 + OTHER
                line.append(f"{number(us)} us, {needed / 1e9:.0f} GB")
                if needed <= 0.95 * H200.memory and layout.batch <= b:
                    fit[us] = layout
            best = fit[min(fit)] if fit else None
            rate = tokens_per_second(V32, min(fit), b) if fit else None
            lines.append([*line, str(best or "none fits"), number(rate)])
    header = ["b", "tokens", *(f"{h} x {16 // h} x 1" for h in (8, 4, 2, 1))]
    return markdown([*header, "choose", "tokens/s, attention alone"], lines)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        constants,
        sums,
        check,
        data,
        context,
        context_sizes,
        devices,
        v32_on_two_nodes,
    )
}


def rewrite(page: str) -> str:
    """The page with its tables made anew."""
    return TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match['name']]()}\n{match[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    new = rewrite(page)
    if not arguments.check:
        PAGE.write_text(new)
    elif new != page:
        print(f"{PAGE} is not what this script makes of the model and the results")
        return 1
    return 0


__all__ = ["PAGE", "TABLES", "Model", "rewrite"]

if __name__ == "__main__":
    sys.exit(main())
