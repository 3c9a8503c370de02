"""Shows results as text: what ran, a line for each shape, and the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jax_flashmla import _interrupt
from jax_flashmla.bench.operation import Operation
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.bench.shape import Result
from jax_flashmla.bench.summary import RATIOS, WIDE_SPREAD, exceeds_limit, spread
from jax_flashmla.bench.units import scale_for, with_unit

NUMBERS = (  # heading, key of the result, format
    ("us", "us", "{:9.2f}"),
    ("fastest", "us_min", "{:9.2f}"),
    ("slowest", "us_max", "{:9.2f}"),
    ("FLOP/s", "tflops", "{:8.4g}"),
    ("B/s", "gbs", "{:7.4g}"),
    ("limit us", "limit_us", "{:9.2f}"),
    ("of limit", "limit_fraction", "{:9.2f}"),
    ("x peers", "speedup_vs_peers", "{:8.2f}"),
    ("beside us", "live_peer_us", "{:9.2f}"),
    ("x beside", "speedup_vs_live_peer", "{:8.2f}"),
    ("x XLA", "speedup_vs_xla", "{:7.2f}"),
    ("x ref", "speedup_vs_reference", "{:7.2f}"),
)
SI = {"tflops": ("FLOP/s", 1e12), "gbs": ("B/s", 1e9)}  # key -> unit, and how many of it are 1


class ShapeTable:
    """The lines of an operation's shapes. Units are those of the device's limits."""

    def __init__(self, operation: Operation, limits: dict[str, Any]) -> None:
        self._fields = operation.fields
        limit = {"tflops": limits["tflops"], "gbs": limits["read_gbs"]}
        self._scales = {
            key: scale_for([limit[key] * factor], unit) for key, (unit, factor) in SI.items()
        }

    def header(self) -> str:
        """The heading line."""
        cells = [f"{name:>{_field_width(name)}}" for name in self._fields]
        for heading, key, template in NUMBERS:
            heading = self._scales[key][1] if key in SI else heading
            cells.append(f"{heading:>{len(template.format(0))}}")
        return " ".join(cells)

    def line(self, result: Result) -> str:
        """One shape; one that failed shows its error instead of numbers."""
        fields = " ".join(f"{result[name]!s:>{_field_width(name)}}" for name in self._fields)
        if "error" in result:
            return f"{fields}  {result['error']}"
        cells = [fields]
        for _, key, template in NUMBERS:
            value = result.get(key)
            if value is not None and key in SI:
                value *= SI[key][1] / self._scales[key][0]
            width = len(template.format(0))
            cells.append(f"{'-':>{width}}" if value is None else template.format(value))
        return " ".join(cells) + _remarks(result) + _launches(result)


def _field_width(name: str) -> int:
    return max(len(name), 7)


def _remarks(result: Result) -> str:
    """What makes the numbers doubtful."""
    remarks = []
    if spread(result) > WIDE_SPREAD:
        remarks.append(f"samples differ by {spread(result):.0%}")
    if exceeds_limit(result):
        remarks.append("faster than its limit")
    if "live_peer_error" in result:
        remarks.append(f"the peer beside: {result['live_peer_error']}")
    return f"  ! {', '.join(remarks)}" if remarks else ""


def _launches(result: Result) -> str:
    """How the calls were launched, where that was looked at."""
    number = result.get("custom_calls", result.get("decode_custom_calls"))
    if number is None:
        return ""
    capture = result["command_buffers"]
    calls = f"  {number} custom calls in the compiled module"
    if capture is None:
        return f"{calls}; no command buffers on this platform"
    return (
        f"{calls}; inside {capture['command_buffers']} command buffers: "
        f"{capture['calls_inside']}, outside: {capture['calls_outside']}"
    )


def print_plain(console: Console, text: str) -> None:
    """Prints a line as it is: not wrapped, not coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_setting(document: dict[str, Any], console: Console) -> None:
    """What the numbers were measured with and are held against."""
    ceilings, limits = document["ceilings"], document["limits"]
    operation = OPERATIONS[document["operation"]]
    table = Table(show_header=False)
    for name in ("hardware", "versions"):
        table.add_row(name, ", ".join(f"{key} {value}" for key, value in document[name].items()))
    changed = ", with uncommitted changes" if document["uncommitted_changes"] else ""
    table.add_row("commit", f"{document['commit'] or 'unknown'}{changed}; {document['date']}")
    table.add_row("operation", f"{operation.name}: {operation.setting}")
    table.add_row(
        "grid",
        f"{document['grid']}, {document['dtype']}, blocks of {document['block_size']} tokens",
    )
    table.add_row(
        "XLA reaches",
        f"copy {_bytes(ceilings['copy_gbs'])}, read {_bytes(ceilings['read_gbs'])}, "
        f"{ceilings['matmul_dtype']} matrix product {_flops(ceilings['matmul_tflops'])}",
    )
    table.add_row(
        "limit model",
        f"max(bytes / {_bytes(limits['read_gbs'])} [{limits['read_source']}], operations / "
        f"{_flops(limits['tflops'])} [{limits['tflops_source']}]) + {limits['overhead_us']:g} us",
    )
    if limits.get("gather_gbs"):
        rates = ", ".join(f"{n} B {_bytes(gbs)}" for n, gbs in limits["gather_gbs"].items())
        table.add_row("rows gathered", f"{rates} [{limits['gather_source']}]")
    console.print(table, highlight=False, markup=False)


def _bytes(gbs: float) -> str:
    return with_unit(gbs * 1e9, "B/s")


def _flops(tflops: float) -> str:
    return with_unit(tflops * 1e12, "FLOP/s")


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Geometric means and slowest shapes by group, and what makes them doubtful."""
    for ratio, title in RATIOS.items():
        if ratio not in summary:
            continue
        print_plain(console, f"{title}:")
        for group, entry in summary[ratio].items():
            where = " ".join(f"{name}={value}" for name, value in entry["least_at"].items())
            print_plain(
                console,
                f"    {group:<22} {_shapes(entry['shapes']):>10}, geometric mean "
                f"{entry['geometric_mean']:6.2f}, least {entry['least']:6.2f} at {where}",
            )
    print_plain(console, f"{_shapes(summary['shapes'])}, {summary['failed']} failed")
    if summary["wide_spread"]:
        print_plain(
            console,
            f"! samples of {_shapes(summary['wide_spread'])} differ by more than {WIDE_SPREAD:.0%}"
            ": something else used the machine, and the ratios say little",
        )
    if summary["limit_exceeded"]:
        print_plain(
            console,
            f"! {_shapes(summary['limit_exceeded'])} faster than the limit model allows: it is "
            "wrong there, and its means leave them out",
        )


def _shapes(n: int) -> str:
    return f"{n} shape" if n == 1 else f"{n} shapes"


def kernel_tables(document: dict[str, Any]) -> str:
    """For each shape that was profiled, a line a kernel: us a call, launches a call, name."""
    operation, lines = OPERATIONS[document["operation"]], []
    for result in document["shapes"]:
        if "kernels" not in result:
            continue
        kernels = result["kernels"]
        lines.append(" ".join(f"{name}={result[name]}" for name in operation.fields))
        lines.append(f"{result['us']:9.2f} us a call, of which kernels:")
        for kernel in kernels:
            lines.append(f"{kernel['us']:9.2f} us {kernel['launches']:6.2f} x  {kernel['name']}")
        us, launches = (sum(kernel[key] for kernel in kernels) for key in ("us", "launches"))
        lines.append(f"{us:9.2f} us {launches:6.2f} x  together\n")
    return "\n".join(lines)


def show(document: dict[str, Any], plots: Path | None, console: Console) -> int:
    """Prints the summary and draws the plots of a document whose shapes are printed already.

    Returns:
        0 if every shape was measured, 1 if one failed, 130 if the run was interrupted.
    """
    print_summary(document["summary"], console)
    if seconds := document.get("wall_seconds"):
        parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        print_plain(console, f"this took {sum(seconds.values()):.0f} s: {parts}")
    if plots is not None:
        from jax_flashmla.bench.plots import draw

        for path in draw(document, plots):
            print_plain(console, f"drawn: {path}")
    if document["interrupted"]:
        console.print("[yellow]interrupted: only the shapes above were measured")
        return _interrupt.STATUS
    return 1 if document["summary"]["failed"] else 0


def show_saved(document: dict[str, Any], plots: Path | None, console: Console) -> int:
    """As `show`, with the setting and the shapes before it."""
    print_setting(document, console)
    table = ShapeTable(OPERATIONS[document["operation"]], document["limits"])
    print_plain(console, table.header())
    for result in document["shapes"]:
        print_plain(console, table.line(result))
    return show(document, plots, console)
