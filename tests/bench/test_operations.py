"""A new operation is a folder and a registration: a toy one goes through all of the benchmark."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from jax_flashmla.bench import document, run
from jax_flashmla.bench.device import DECODE_TARGET
from jax_flashmla.bench.measure import Ceilings
from jax_flashmla.bench.operation import Axes, Calls, Grid, Operation, Timed
from jax_flashmla.bench.operations import OPERATIONS
from jax_flashmla.cli import main

pytestmark = pytest.mark.usefixtures("on_cpu")


@dataclasses.dataclass(frozen=True)
class Shape:
    topk: int
    kind: str

    def __str__(self):
        return f"{self.topk} {self.kind}"

    @property
    def flops(self):
        return self.topk

    @property
    def bytes(self):
        return 4 * self.topk

    cache_bytes = bytes

    @property
    def gathered(self):
        return {}

    @property
    def facts(self):
        return {"numbers": self.topk}


def programs(shape, pool, setup, *, with_xla):
    lowered = jax.jit(jnp.sum).lower(jax.ShapeDtypeStruct((shape.topk,), setup.dtype))
    return {"kernel": lowered, "xla": lowered} if with_xla else {"kernel": lowered}


def make_calls(shape, pool, setup, programs):
    x = pool[: shape.topk]
    kernel, *others = (Timed(program, (x,), 1) for program in programs.values())
    baselines = dict(zip(("xla",), others, strict=False))
    return Calls(kernel, lambda total: abs(float(total) - shape.topk), baselines)


TOY = Operation(
    name="toy",
    setting="sums of ones",
    shape=Shape,
    grids={"few": Grid(lambda: (Shape(64, "a"), Shape(4096, "b")))},
    default_grids={"cpu": "few", "gpu": "few"},
    xla_shapes=(),
    dtypes=("float32",),
    block_sizes=(64, 1),
    peers=lambda shape, **options: {"best_us": 1e9} if shape.kind == "b" else {},
    group=lambda result: result["kind"],
    axes=Axes(
        x="topk",
        x_label="numbers",
        series="topk",
        series_label="numbers",
        panel=lambda result: (0,),
        panel_title=lambda result: "sums",
        preferred=lambda results: results,
        kind=lambda result: result["topk"],
        kind_label="numbers",
        size="numbers",
        size_label="numbers",
    ),
    calls=lambda: types.SimpleNamespace(
        TARGET=DECODE_TARGET,
        MAX_RELATIVE_ERROR=0.0,
        memory=lambda shape, setup: shape.bytes,
        make_pool=lambda shapes, setup: jnp.ones(max(s.topk for s in shapes), setup.dtype),
        programs=programs,
        make_calls=make_calls,
    ),
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "toy", TOY)
    ceilings = Ceilings(30.0, 40.0, 0.2, 1024, "float32")
    monkeypatch.setattr(run, "measure_ceilings", lambda device, method: ceilings)


def test_it_is_measured_recorded_drawn_and_shown_again(tmp_path, capsys):
    file, plots = tmp_path / "toy.json", tmp_path / "plots"
    options = ("--operation", "toy", "--dtype", "float32", "--block-size", "1")
    assert main(["bench", *options, "--json", str(file)]) == 0
    measured = capsys.readouterr().out
    assert "2 shapes, 0 failed" in measured
    assert "toy: sums of ones" in " ".join(measured.replace("│", "").split())
    found = document.read(file)
    assert [(s["topk"], s["kind"], s["numbers"]) for s in found["shapes"]] == [
        (64, "a", 64),
        (4096, "b", 4096),
    ]
    assert found["summary"]["speedup_vs_peers"]["b"]["least_at"] == {"topk": 4096, "kind": "b"}
    assert set(found["summary"]["speedup_vs_xla"]) == {"all", "a", "b"}
    assert main(["bench", "--from", str(file), "--plots", str(plots)]) == 0
    assert {path.name for path in plots.iterdir()} == {"few_latency.png", "few_roofline.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "targets"], "--grid of toy must be one of few, got targets"),
        ([], "--dtype of toy must be one of float32, got bfloat16"),
        (["--dtype", "float32", "--block-size", "16"], "must be one of 64, 1, got 16"),
        (["--dtype", "float32", "--shapes", "b=3"], "field=value with field in topk, kind"),
    ],
)
def test_what_it_does_not_have_is_named(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--operation", "toy", *options])
    assert message in capsys.readouterr().err


def test_results_of_an_unknown_operation_are_refused(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps({**dict.fromkeys(document.FIELDS), "operation": "other"}))
    names = "dense_decode, sparse_decode, sparse_prefill, index_scores, index_topk, layer_step, toy"
    with pytest.raises(ValueError, match=f"an operation in {names}, got 'other'"):
        document.read(file)
