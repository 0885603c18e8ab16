"""The factors of a saved adapter. What they do is held against PEFT in tests/export and tests/train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from moesmith.errors import UserError
from moesmith.models.lora_factors import (
    A,
    B,
    as_peft,
    factors,
    parameters,
    places,
    read_adapter,
    side_by_side,
)

EXPERTS = "base_model.model.model.layers.0.mlp.experts"
E, R, INNER, OUTER = 3, 2, 5, 7


def weights(*names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        found[name + A] = torch.randn(E * R, INNER, generator=generator)
        found[name + B] = torch.randn(OUTER, R * E, generator=generator)
    return found


def config(**options) -> LoraConfig:
    return LoraConfig(r=R, lora_alpha=3, target_modules=[], **options)


def test_the_expert_is_slowest_in_a_and_fastest_in_b():
    given = weights(EXPERTS)
    part = factors(EXPERTS, config(), given)
    for e in range(E):
        assert torch.equal(part.a_ERI[e], given[EXPERTS + A][e * R : (e + 1) * R])
        assert torch.equal(part.b_EOR[e], given[EXPERTS + B][:, e::E] * 3 / R)
    again = as_peft(part)
    assert torch.equal(again[0], given[EXPERTS + A]) and torch.equal(again[1], given[EXPERTS + B] * 3 / R)
    assert part.shape == (E, INNER, OUTER) and part.rank == R
    assert factors("elsewhere", config(), given) is None


def test_side_by_side_is_a_sum():
    one, two = (factors(EXPERTS, config(), {k: t + i for k, t in weights(EXPERTS).items()}) for i in (0, 1))
    both = side_by_side([one, two])
    torch.testing.assert_close(both.b_EOR @ both.a_ERI, one.b_EOR @ one.a_ERI + two.b_EOR @ two.a_ERI)


def test_the_innermost_is_the_first_parameter_of_the_module():
    targets = ["model.layers.0.mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    given = weights(f"{EXPERTS}.base_layer", EXPERTS)
    found = parameters(config(target_parameters=targets), given)
    assert found == {f"{EXPERTS}.base_layer": targets[0].replace("down", "gate_up"), EXPERTS: targets[0]}
    turned = parameters(config(target_parameters=targets), given, lambda _: ["down_proj", "gate_up_proj"])
    assert turned[EXPERTS].endswith("gate_up_proj")
    assert parameters(config(), weights("base_model.model.a.q_proj")) == {
        "base_model.model.a.q_proj": "a.q_proj.weight"
    }
    with pytest.raises(UserError, match="1 pairs of factors .* and names 2"):
        parameters(config(target_parameters=targets), weights(EXPERTS))


def test_rank_and_alpha_of_one_parameter():
    name = "model.layers.0.mlp.experts.gate_up_proj"
    options = config(
        target_parameters=[name, "mlp.experts.down_proj"],
        rank_pattern={"gate_up_proj": 1},
        alpha_pattern={"gate_up_proj": 4},
    )
    given = weights(f"{EXPERTS}.base_layer", EXPERTS)
    with pytest.raises(UserError, match="different rank or alpha"):
        factors(f"{EXPERTS}.base_layer", options, given)
    part = factors(f"{EXPERTS}.base_layer", options, given, parameter=name)
    assert part.shape[0] == E * R and part.rank == 1
    assert factors(EXPERTS, options, given, parameter="model.layers.0.mlp.experts.down_proj").rank == R


def test_half_a_pair_and_wrong_ranks_are_refused():
    given = weights(EXPERTS)
    with pytest.raises(UserError, match=r"\(6, 5\) and \(7, 6\) are not of rank 4"):
        factors(EXPERTS, LoraConfig(r=4, target_modules=[]), given)
    del given[EXPERTS + B]
    with pytest.raises(UserError, match="one of two factors"):
        places(given)


def test_an_adapter_that_cannot_be_read_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="holds no adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match="cannot be read") as error:
        read_adapter(tmp_path)
    assert "\n" not in error.value.message
