"""The vector quantiser against its definition, with one process and with two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from limbeck.errors import UserError
from limbeck.models.quantize import VectorQuantizer, code_usage

K, D, N = 6, 4, 40


def vectors(seed: int = 1, n: int = N) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def quantizer(**settings) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(K, D, **settings)


def test_every_row_becomes_the_code_of_the_largest_cosine():
    model, h = quantizer().eval(), vectors()
    found = model(h)
    for row, code, vector in zip(h, found.codes, found.vectors, strict=True):
        cosines = [float(F.cosine_similarity(row, each, dim=0)) for each in model.codebook]
        assert int(code) == max(range(K), key=cosines.__getitem__)
        assert torch.allclose(vector, model.codebook[code], atol=1e-6)
    assert torch.equal(found.scores.argmax(-1), found.codes)


def test_every_row_becomes_the_code_of_the_smallest_distance():
    model, h = quantizer(metric="euclidean").eval(), vectors()
    found = model(h)
    distances = (h[:, None] - model.codebook[None]).norm(dim=-1)
    assert torch.equal(found.codes, distances.argmin(-1))
    assert torch.allclose(-found.scores, distances.square(), atol=1e-5)


def test_the_first_of_equal_codes_wins():
    model = quantizer().eval()
    model.codebook[3] = 2 * model.codebook[1]
    assert int(model(model.codebook[1][None]).codes) == 1


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_gradient_goes_straight_through_and_none_reaches_the_codes(metric):
    model, h = quantizer(metric=metric), vectors().requires_grad_()
    wanted = torch.randn(N, D)
    (model(h).vectors * wanted).sum().backward()
    assert torch.equal(h.grad, wanted)
    assert not list(model.parameters()) and not model.codebook.requires_grad


def test_commitment_is_the_weighted_mean_square_and_pulls_the_vectors_only():
    model, h = quantizer(commitment=0.25).eval(), vectors().requires_grad_()
    found = model(h)
    picked = model.codebook[found.codes]
    assert torch.allclose(found.commitment, 0.25 * (picked - h).square().mean())
    found.commitment.backward()
    assert torch.allclose(h.grad, 0.25 * 2 * (h - picked).detach() / h.numel())


def test_a_code_moves_so_much_of_the_way_to_the_mean_of_its_unit_vectors():
    model = quantizer(decay=0.8)
    model.codebook.copy_(-torch.ones(K, D))
    model.codebook[2] = torch.tensor([3.0, 0.0, 0.0, 0.0])
    h = torch.tensor([[1.0, 0.2, 0.0, 0.0], [5.0, 0.0, 3.0, 0.0]])
    found = model(h)
    assert found.codes.tolist() == [2, 2]
    mean = F.normalize(F.normalize(h, dim=-1).mean(0), dim=0)
    assert torch.allclose(model.codebook[2], 0.8 * torch.tensor([3.0, 0.0, 0.0, 0.0]) + 0.2 * mean)
    # The answer shows the code as it was before it moved.
    assert torch.allclose(found.vectors[0], torch.tensor([3.0, 0.0, 0.0, 0.0]))


def test_an_unused_code_keeps_its_direction_and_drifts_to_unit_norm():
    model = quantizer(decay=0.8)
    model.codebook[0] = -4 * torch.ones(D)
    for _ in range(50):
        model(torch.ones(3, D))
    assert torch.allclose(model.codebook[0], -torch.ones(D) / 2, atol=1e-3)


def test_euclidean_codes_are_the_moving_sums_over_the_moving_counts():
    model, h = quantizer(metric="euclidean", decay=0.9, epsilon=1e-9), vectors()
    before, codes = model.codebook.clone(), quantizer(metric="euclidean").eval()(h).codes
    model(h)
    for k in range(K):
        mine = h[codes == k]
        count = 0.9 + 0.1 * len(mine)
        assert torch.allclose(model.codebook[k], (0.9 * before[k] + 0.1 * mine.sum(0)) / count, atol=1e-5)


def test_nothing_moves_in_eval_mode():
    model = quantizer(expire_below=5.0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(vectors())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_codes_that_are_hardly_used_become_vectors_of_the_batch(metric):
    model = quantizer(metric=metric, expire_below=0.9)
    far = torch.full((D,), -100.0)
    model.codebook[1] = far
    if metric == "euclidean":
        model.sums[1] = far
    h = vectors().abs()
    for _ in range(2):
        model(h)
    rows = F.normalize(h, dim=-1) if metric == "cosine" else h
    assert float((rows - model.codebook[1]).norm(dim=-1).min()) < 0.5 and bool((model.usage >= 0.9).all())


def test_k_means_finds_separate_groups():
    centres = torch.eye(4)[:3] * 5
    h = (centres.repeat_interleave(20, 0) + 0.01 * vectors(n=60)).flip(0)
    torch.manual_seed(4)
    model = VectorQuantizer(12, D, metric="euclidean")
    model.initialise(h, iterations=5)
    assert float((model.scores(h).amax(-1)).abs().max()) < 0.01
    assert torch.equal(model.sums, model.codebook)
    with pytest.raises(UserError, match="k-means of 12 codes needs as many vectors, got 5"):
        model.initialise(h[:5])


def test_any_number_of_leading_dimensions_gives_the_same_rows():
    model, h = quantizer().eval(), vectors()
    flat, folded = model(h), model(h.reshape(2, 4, 5, D))
    assert torch.equal(folded.vectors.reshape(N, D), flat.vectors)
    assert torch.equal(folded.codes.flatten(), flat.codes) and folded.scores.shape == (2, 4, 5, K)


def test_usage_counts_codes_and_their_evenness():
    assert code_usage(torch.tensor([0, 1, 2, 3]), 8) == (4, pytest.approx(4.0))
    assert code_usage(torch.tensor([5, 5, 5]), 8) == (1, pytest.approx(1.0))


def test_a_step_reads_nothing_back_from_the_device():
    for settings in ({}, {"metric": "euclidean", "expire_below": 1.0}):
        model = quantizer(**settings).to("meta")
        assert model(torch.empty(3, D, device="meta")).commitment.shape == ()


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="decay is 2"):
        VectorQuantizer(K, D, decay=2)
    with pytest.raises(UserError, match="codebook of 0 codes"):
        VectorQuantizer(0, D)
    with pytest.raises(UserError, match="choose cosine or euclidean"):
        VectorQuantizer(K, D, metric="dot")


def states_after(rank: int, world: int) -> dict[str, Tensor]:
    """Codebooks of both kinds after some steps on this process's share of the batches, and the answers."""
    states = {}
    for metric in ("cosine", "euclidean"):
        model = quantizer(metric=metric)
        for step in range(3):
            found = model(vectors(step).chunk(world)[rank])
        states |= {f"{metric}.{name}": value.clone() for name, value in model.state_dict().items()}
        states[f"{metric}.answer"] = found.vectors
    return states


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    states = states_after(rank, 2)
    torch.manual_seed(rank)
    expiring = VectorQuantizer(K, D, expire_below=30.0)
    expiring.initialise(vectors(rank))
    states["start"] = expiring.codebook.clone()
    expiring(vectors(rank))
    states["expired"] = expiring.codebook.clone()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_codebook_that_one_with_the_double_batch_has(tmp_path: Path):
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    alone = states_after(0, 1)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in alone.items():
        if key.endswith(".answer"):
            assert torch.allclose(torch.cat([first[key], second[key]]), value, atol=1e-6)
        else:
            assert torch.allclose(first[key], value, atol=1e-6) and torch.equal(first[key], second[key]), key
    # What is drawn (k-means' start, replaced codes) is the same on both, though their random states differ.
    assert torch.equal(first["start"], second["start"]) and torch.equal(first["expired"], second["expired"])
    unit = F.normalize(torch.cat([vectors(0), vectors(1)]), dim=-1)
    assert bool((first["expired"] @ unit.T).amax(-1).gt(1 - 1e-5).all())
