"""Shows results as text: what ran, a line for each row, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jax_flashmla.cli.bench.summary import RATIOS

COLUMNS = (  # heading, key of the row, format
    ("b", "b", "{:4d}"),
    ("s_q", "s_q", "{:4d}"),
    ("h_q", "h_q", "{:4d}"),
    ("s_k", "s_k", "{:7d}"),
    ("lengths", "lengths", "{:>8}"),
    ("us", "us", "{:9.2f}"),
    ("TFLOP/s", "tflops", "{:8.4g}"),
    ("GB/s", "gbs", "{:7.4g}"),
    ("limit us", "limit_us", "{:9.2f}"),
    ("of limit", "limit_fraction", "{:9.2f}"),
    ("x peers", "speedup_vs_peers", "{:8.2f}"),
    ("x XLA", "speedup_vs_xla", "{:7.2f}"),
    ("x ref", "speedup_vs_reference", "{:7.2f}"),
)
SHAPE_COLUMNS = 5
INTERRUPTED = 130  # exit status of a command that Ctrl-C ended


def _width(template: str) -> int:
    return len(template.format("" if ">" in template else 0))


def header() -> str:
    """The rows' heading line."""
    return " ".join(f"{heading:>{_width(template)}}" for heading, _, template in COLUMNS)


def line(row: dict[str, Any]) -> str:
    """One row; one that failed shows its error instead of numbers."""
    cells = []
    for _, key, template in COLUMNS:
        value = row.get(key)
        cells.append(f"{'-':>{_width(template)}}" if value is None else template.format(value))
    if "error" in row:
        return " ".join(cells[:SHAPE_COLUMNS]) + "  " + row["error"]
    return " ".join(cells) + _launches(row)


def _launches(row: dict[str, Any]) -> str:
    """How the calls were launched, where that was looked at."""
    if "decode_custom_calls" not in row:
        return ""
    capture = row["command_buffers"]
    calls = f"  {row['decode_custom_calls']} decode calls in the compiled module"
    if capture is None:
        return f"{calls}; no command buffers on this platform"
    return (
        f"{calls}; custom calls inside {capture['command_buffers']} command buffers: "
        f"{capture['calls_inside']}, outside: {capture['calls_outside']}"
    )


def print_plain(console: Console, text: str) -> None:
    """Prints a line as it is: not wrapped, not coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_setting(document: dict[str, Any], console: Console) -> None:
    """What the numbers were measured with and are held against."""
    ceilings, limits = document["ceilings"], document["limits"]
    table = Table(show_header=False)
    for name in ("hardware", "versions"):
        table.add_row(name, ", ".join(f"{key} {value}" for key, value in document[name].items()))
    changed = ", with uncommitted changes" if document["uncommitted_changes"] else ""
    table.add_row("commit", f"{document['commit'] or 'unknown'}{changed}; {document['date']}")
    table.add_row(
        "grid",
        f"{document['grid']}, {document['dtype']}, blocks of {document['block_size']} tokens",
    )
    table.add_row(
        "XLA reaches",
        f"copy {ceilings['copy_gbs']:.0f} GB/s, read {ceilings['read_gbs']:.0f} GB/s, "
        f"{ceilings['matmul_dtype']} matrix product {ceilings['matmul_tflops']:.4g} TFLOP/s",
    )
    table.add_row(
        "limit model",
        f"max(bytes / {limits['read_gbs']:.0f} GB/s [{limits['read_source']}], operations / "
        f"{limits['tflops']:.4g} TFLOP/s [{limits['tflops_source']}]) + "
        f"{limits['overhead_us']:g} us",
    )
    console.print(table, highlight=False, markup=False)


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Geometric means and slowest rows by group."""
    for ratio, title in RATIOS.items():
        if ratio not in summary:
            continue
        print_plain(console, f"{title}:")
        for group, entry in summary[ratio].items():
            where = " ".join(f"{name}={value}" for name, value in entry["least_at"].items())
            print_plain(
                console,
                f"    {group:<22} {entry['rows']:4d} rows, geometric mean "
                f"{entry['geometric_mean']:6.2f}, least {entry['least']:6.2f} at {where}",
            )
    print_plain(console, f"{summary['rows']} rows, {summary['failed']} failed")


def show(document: dict[str, Any], plots: Path | None, console: Console) -> int:
    """Prints the summary and draws the plots of a document whose rows are printed already.

    Returns:
        0 if every row was measured, 1 if a row failed, 130 if the run was interrupted.
    """
    print_summary(document["summary"], console)
    if plots is not None:
        from jax_flashmla.cli.bench.plots import draw

        for path in draw(document, plots):
            print_plain(console, f"drawn: {path}")
    if document["interrupted"]:
        console.print("[yellow]interrupted: only the rows above were measured")
        return INTERRUPTED
    return 1 if document["summary"]["failed"] else 0


def show_saved(document: dict[str, Any], plots: Path | None, console: Console) -> int:
    """As `show`, with the setting and the rows before it."""
    print_setting(document, console)
    print_plain(console, header())
    for row in document["rows"]:
        print_plain(console, line(row))
    return show(document, plots, console)
