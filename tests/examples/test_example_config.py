"""examples/deepseek/config.py: what real and broken config.json files say."""

from __future__ import annotations

import json
import shutil

import pytest

import golden_models
from deepseek.config import ModelConfig

V3 = golden_models.GOLDEN / "deepseek_v3"


@pytest.fixture
def read(tmp_path):
    """Reads the golden V3 config with changes, and the generation config given, if any."""

    def read(generation: object = None, **changes: object) -> ModelConfig:
        config = json.loads((V3 / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_directory(tmp_path)

    return read


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({"moe_layer_freq": [0, 1, 0, 1], "first_k_dense_replace": 0}, [False, True, False, True]),
        ({"moe_layer_freq": [1, 1, 0, 1], "first_k_dense_replace": 1}, [False, True, False, True]),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, [False, False, True, False]),
        (
            {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"]},
            [False, True, True, False],
        ),
    ],
)
def test_layers_with_experts(read, changes, sparse):
    config = read(num_hidden_layers=4, **changes)
    assert [moe is not None for moe in config.moe] == sparse


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        (None, 7, {7}),
        ({}, 7, {7}),
        ({"eos_token_id": None}, [7, 9], {7, 9}),
        ({"eos_token_id": 0}, 7, {0}),
        ({"eos_token_id": [3, 4]}, None, {3, 4}),
        (None, None, set()),
    ],
)
def test_stop_tokens_of_either_file(read, generation, eos, expected):
    assert read(generation, eos_token_id=eos).stop_tokens == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"moe_layer_freq": 0},
            "moe_layer_freq must be an integer of at least 1, or a list.* got 0",
        ),
        ({"moe_layer_freq": [1]}, r"moe_layer_freq must .* num_hidden_layers = 2 .* got \[1\]"),
        ({"moe_layer_freq": [1, 2]}, r"moe_layer_freq must .* got \[1, 2\]"),
        ({"moe_layer_freq": "1"}, "moe_layer_freq must .* got '1'"),
        ({"mlp_layer_types": ["dense"]}, r"mlp_layer_types must be .* = 2 layers, got \['dense'\]"),
        ({"mlp_layer_types": ["dense", "moe"]}, "mlp_layer_types must be 'dense' or 'sparse'"),
        ({"mlp_layer_types": []}, r"mlp_layer_types must be .* got \[\]"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer of at least 1, got '2'"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers must be an integer .*, got 2.0"),
        ({"n_routed_experts": True}, "n_routed_experts must be an integer .*, got True"),
        ({"n_shared_experts": "1"}, "n_shared_experts must be an integer of at least 0, got '1'"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be .* at least 0, got -1"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be a positive number"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob must be true or false, got 'true'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        (
            {"eos_token_id": "</s>"},
            "eos_token_id must be a token's id or a list of ids, got '</s>'",
        ),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id must be"),
        ({"eos_token_id": True}, "eos_token_id must be"),
    ],
)
def test_bad_values_are_named(read, changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_what_changes_the_mathematics_is_refused(read):
    with pytest.raises(NotImplementedError, match="mlp_bias must be false, got True"):
        read(mlp_bias=True)
    assert read(mlp_bias=False).num_layers == 2


@pytest.mark.parametrize(("name", "absent"), [("deepseek_v3", True), ("deepseek_v2", False)])
def test_weights_are_normalised_by_default_as_in_transformers(tmp_path, name, absent):
    config = json.loads((golden_models.GOLDEN / name / "config.json").read_text())
    assert config.pop("norm_topk_prob") == absent
    for key, expected in (({}, absent), ({"norm_topk_prob": None}, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **key}))
        assert ModelConfig.from_directory(tmp_path).moe[1].normalise == expected


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "3", '"text"'])
def test_files_that_hold_no_object_are_named(tmp_path, name, text):
    directory = shutil.copytree(V3, tmp_path / "model")
    (directory / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} must be a JSON object"):
        ModelConfig.from_directory(directory)
