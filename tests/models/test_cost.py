"""Costs against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.models import (
    SmallCnn,
    count_flops,
    count_parameters,
    count_weight_bytes,
    load_model,
    measure_cost,
    measure_latency,
    resnet20,
)


def test_flops_of_a_linear_layer_are_twice_its_products():
    assert count_flops(nn.Linear(7, 5), torch.rand(3, 7)) == 2 * 7 * 5


def test_flops_of_resnet20_are_those_of_the_literature():
    """41 million multiply-adds on 32x32."""
    assert count_flops(resnet20(), torch.rand(1, 3, 32, 32)) / 2e6 == pytest.approx(40.6, abs=0.5)


def test_fused_attention_counts_as_plain_attention():
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    flops = [
        count_flops(load_model("hf-config:bert", config={**tiny, "vocab_size": 50}, attn_implementation=kind), tokens)
        for kind in ("eager", "sdpa")
    ]
    assert flops[0] == flops[1] > 0


def test_bytes_follow_precision_and_shared_memory_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert count_weight_bytes(model) == 2 * 16 * 4
    assert count_weight_bytes(model.half()) == 2 * 16 * 2
    model[1].weight = model[0].weight
    assert count_weight_bytes(model) == 16 * 2
    assert count_parameters(model) == 16


def test_measuring_leaves_mode_and_statistics_alone():
    model = SmallCnn().train()
    model.stages[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost = measure_cost(model, torch.rand(1, 3, 8, 8), batch_size=4, repeats=3)
    assert cost.latency_ms > 0 and cost.batch_size == 4
    assert model.training and model.stages[1].training and not model.stages[0].training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_latency_is_of_the_batch_size_asked_for():
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x

    measure_latency(Watch(), torch.rand(2, 3), batch_size=5, repeats=2, warmup=1)
    assert seen == [5, 5, 5]


def test_an_empty_example_is_refused():
    with pytest.raises(UserError, match="no rows"):
        count_flops(nn.Linear(2, 2), torch.rand(0, 2))
