"""docs/scaling.md is what scripts/scaling_doc.py makes of the model and the committed results."""

from __future__ import annotations

import importlib
import json
import pathlib
import re
import sys

import pytest

import jax_flashmla._limits as limits
from jax_flashmla.layers import MLAConfig, MLAParams, RopeConfig

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CONFIG = ROOT / "csrc" / "sm90" / "all_reduce_sum" / "config.h"
EXCHANGE = ROOT / "csrc" / "sm90" / "exchange" / "config.h"
EXCHANGED = ROOT / "csrc" / "params" / "exchange.h"
PARAMS = ROOT / "csrc" / "params" / "peers.h"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module
    for name in ("scaling_doc", "scaling_model", "performance_doc", "performance_tables"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_script_makes(load) -> None:
    scaling_doc = load("scaling_doc")
    page = scaling_doc.PAGE.read_text()
    assert scaling_doc.rewrite(page) == page
    assert set(re.findall(r"<!-- table: (\w+) -->", page)) == set(scaling_doc.TABLES)


def test_weights_are_those_of_the_layers(load) -> None:
    """By arithmetic and by shapes; norms and rope's columns of both are below a percent."""
    model = load("scaling_model")
    for split in (1, 8):
        config = MLAConfig(
            hidden_size=7168, num_heads=128 // split, q_lora_rank=1536, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            rope=RopeConfig(layout="deinterleaved"),
        )  # fmt: skip
        shapes = vars(MLAParams.shapes(config)).values()
        elements = sum(shape.size for shape in shapes if shape is not None)
        assert model.V3.weights(split) == pytest.approx(2 * elements, rel=1e-3)


def test_the_model_is_near_what_was_measured(load) -> None:
    """Within a tenth: layers without a sum and over peers, sequences and tokens over devices."""
    scaling_doc, model = load("scaling_doc"), load("scaling_model")
    compared = 0
    for card, document, result in scaling_doc.runs("tensor"):
        for kind in ("none", "peers"):
            layout = model.Layout(heads=result["devices"])
            us = model.layer_time(card, model.V3, layout, result["b"], document["tokens"], kind)
            assert us["layer"] == pytest.approx(result[f"{kind}_us"], rel=0.1)
            compared += 1
    for card, document, result in scaling_doc.runs("data"):
        us = model.layer_time(card, model.V3, model.Layout(), result["b"], document["tokens"])
        assert us["layer"] == pytest.approx(result["together_us"], rel=0.1)
        compared += 1
    for card, document in scaling_doc.context_documents():
        for shape in document["shapes"]:
            if shape["devices"] > 1 and shape["peers"]:
                us = scaling_doc.context_model(card, shape)
                assert us == pytest.approx(shape["us"], rel=0.1)
                compared += 1
    assert compared >= 13


def test_layouts_share_all_devices(load) -> None:
    model = load("scaling_model")
    for devices in (1, 2, 8, 64):
        found = list(model.layouts(devices))
        assert {layout.devices for layout in found} == {devices}
        assert all(layout.heads * layout.context <= 8 for layout in found)
    assert model.best_layout(model.H100, model.V3, 1, 8192, 4096) is None  # 38 GB of cache a layer
    alone = model.layer_time(model.H100, model.V3, model.Layout(), 32, 4096)
    assert alone["heads"] == alone["context"] == 0
    assert sum(alone.values()) == pytest.approx(2 * alone["layer"])


def test_limits_are_those_of_the_kernel(load) -> None:
    def product(name: str, path: pathlib.Path) -> int:
        (text,) = re.findall(rf"constexpr \w+ {name} = ([\d *]+);", path.read_text())
        value = 1
        for factor in text.split("*"):
            value *= int(factor)
        return value

    assert product("kMaxPeers", PARAMS) == limits.MAX_PEERS
    assert product("kMaxMessageBytes", CONFIG) == limits.MAX_SUM_BYTES
    model = load("scaling_model")
    assert product("kSecondRoundBytes", CONFIG) == model.ONE_ROUND_BYTES
    assert model.PEERS_MOST == limits.MAX_SUM_BYTES
    assert product("kMaxExchangeBytes", EXCHANGE) == limits.MAX_EXCHANGE_BYTES
    assert product("kMaxExchanged", EXCHANGED) == limits.MAX_EXCHANGED
    assert model.EXCHANGE_MOST == limits.MAX_EXCHANGE_BYTES


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/parallel/*.json")), ids=lambda p: p.stem)
def test_results_say_where_they_were_measured(path: pathlib.Path) -> None:
    document = json.loads(path.read_text())
    assert document["hardware"]["device"].startswith("NVIDIA H")
    assert document["commit"]
    assert document.get("results") or document["shapes"]
