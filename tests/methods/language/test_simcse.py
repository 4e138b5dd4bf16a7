"""SimCSE: its loss by a loop, its views, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from limbeck.errors import UserError
from limbeck.methods.language.simcse import SimCSE
from limbeck.models import load_encoder
from limbeck.train import average_gradients

CONFIG = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def method(**arguments: Any) -> SimCSE:
    torch.manual_seed(0)
    return SimCSE(load_encoder("hf-config:bert", config=CONFIG, vocab_size=50), **arguments)


def batch() -> dict[str, Any]:
    ids = torch.randint(5, 50, (4, 6), generator=torch.Generator().manual_seed(0))
    return {"sentences": {"tokens": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}}


def test_the_loss_is_the_papers_formula_in_a_loop() -> None:
    simcse, inputs = method(temperature=0.1), batch()["sentences"]["tokens"]
    torch.manual_seed(3)
    loss = simcse.training_step(batch())["info_nce"]
    torch.manual_seed(3)
    h, other = (simcse.projection(simcse.student(inputs)) for _ in range(2))
    terms = []
    for i in range(4):
        similar = torch.stack([F.cosine_similarity(h[i], other[j], dim=0) for j in range(4)]) / 0.1
        terms.append(similar.logsumexp(0) - similar[i])
    assert float(loss.detach()) == pytest.approx(float(torch.stack(terms).mean().detach()), rel=1e-5)


def test_the_two_views_differ_by_dropout_and_both_get_gradients() -> None:
    simcse, inputs = method(), batch()["sentences"]["tokens"]
    assert not simcse.student(inputs).equal(simcse.student(inputs))
    simcse.training_step(batch())["info_nce"].backward()
    assert all(p.grad is not None for p in simcse.parameters())


def test_the_projection_trains_but_does_not_ship() -> None:
    assert simcse_parameters(method()) > simcse_parameters(method(projection=False))
    assert method().shipped() is not None and not hasattr(method().shipped(), "projection")


def simcse_parameters(simcse: SimCSE) -> int:
    return sum(p.numel() for p in simcse.parts()["student"])


def test_a_student_without_dropout_or_of_another_kind_is_refused() -> None:
    still = load_encoder("hf-config:bert", config={**CONFIG, "hidden_dropout_prob": 0.0,
                         "attention_probs_dropout_prob": 0.0}, vocab_size=50)  # fmt: skip
    with pytest.raises(UserError, match="differ by dropout alone"):
        SimCSE(still)
    with pytest.raises(UserError, match="got Linear"):
        SimCSE(nn.Linear(2, 2))
    with pytest.raises(UserError, match="temperature is 0"):
        method(temperature=0.0)


def gradients(rows: slice) -> dict[str, torch.Tensor]:
    """Of a step on these sentences, averaged over the processes; without dropout, so that both views are equal."""
    simcse = method()
    for module in simcse.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    tokens = {name: part[rows] for name, part in batch()["sentences"]["tokens"].items()}
    simcse.eval().training_step({"sentences": {"tokens": tokens}})["info_nce"].backward()
    average_gradients(simcse.parameters())
    return {name: p.grad for name, p in simcse.named_parameters() if p.grad is not None}


def step_together(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(gradients(slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    mp.spawn(step_together, (str(tmp_path),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, whole in gradients(slice(0, 4)).items():
        assert both[0][name].equal(both[1][name])
        assert torch.allclose(both[0][name], whole, rtol=1e-3, atol=1e-4), name
