"""DeLoRes-M: its contrast against a loop, where no gradient goes, and a queue that two processes share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Samples, Stream
from limbeck.errors import UserError
from limbeck.methods.audio.delores_m import DeLoResM, contrast
from limbeck.models import AudioNTT, convert_sync_batchnorm
from limbeck.train import average_gradients

B, M, T, Q = 4, 16, 16, 12


def stream(batch_size: int = B, rows: int = 8) -> Stream:
    return Stream(Samples({"spectrogram": clips(0, rows)}), batch_size, view_field="spectrogram")


def clips(seed: int, rows: int = B) -> Tensor:
    return torch.randn(rows, 1, M, T, generator=torch.Generator().manual_seed(seed))


def method(**settings: float) -> DeLoResM:
    torch.manual_seed(0)
    net = AudioNTT(n_mels=M, channels=4, width=16, dropout=0.0)
    made = DeLoResM(net, **{"queue": Q, "embedding": 8, "barlow_width": 6, **settings})  # type: ignore[arg-type]
    made.prepare({"unlabelled": stream()})
    return made


def batch(seed: int, rows: slice = slice(None)) -> dict:
    return {"unlabelled": {"first": clips(seed, 2 * B)[rows], "second": clips(seed + 1, 2 * B)[rows]}}


def test_the_contrast_is_the_loop_over_own_key_and_queue() -> None:
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(rows, 8)) for rows in (B, B, Q))
    total = 0.0
    for i in range(B):
        own = math.exp(float(query[i] @ key[i]) / 0.07)
        others = sum(math.exp(float(query[i] @ queue[j]) / 0.07) for j in range(Q))
        total -= math.log(own / (own + others))
    assert float(contrast(query, key, queue, 0.07)) == pytest.approx(total / B, rel=1e-5)


def test_no_gradient_reaches_the_key_encoder() -> None:
    made = method()
    sum(made.training_step(batch(1)).values()).backward()
    assert all(p.grad is None for p in (*made.key_encoder.parameters(), *made.key_head.parameters()))
    trained = [*made.student.blocks.parameters(), *made.student.fc.parameters(), *made.head.parameters()]
    assert all(p.grad is not None for p in (*trained, *made.projectors.parameters()))
    assert not any(p is q for p in made.parts()["student"] for q in made.key_encoder.parameters())


def test_keys_start_as_the_queries_and_follow_with_the_decay() -> None:
    made = method(key_decay=0.9)
    before = [p.clone() for p in made.key_encoder.parameters()]
    assert all(torch.equal(k, q) for k, q in zip(before, made.student.parameters(), strict=True))
    with torch.no_grad():
        for p in made.student.parameters():
            p += 1
    made.after_step()
    for old, key in zip(before, made.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * (old + 1))


def test_the_queue_starts_with_unit_vectors_and_the_oldest_keys_leave_first() -> None:
    made = method()
    torch.testing.assert_close(made.queue.norm(dim=1), torch.ones(Q))
    start = made.queue.clone()
    keys = F.normalize(torch.randn(5, 8))
    made._enqueue(keys)
    assert torch.equal(made.queue, torch.cat([keys, start[5:]]))
    for _ in range(2):
        made._enqueue(keys)
    assert torch.equal(made.queue[12 - 2 :], keys[:2]) and torch.equal(made.queue[:3], keys[2:])


def test_keys_of_this_step_are_negatives_of_the_next_one_only() -> None:
    made = method()
    queue = made.queue.clone()
    with torch.no_grad():
        query = F.normalize(made.head(made.query_taps(batch(1)["unlabelled"]["first"])[-1]))
        key = F.normalize(made.key_head(made.key_taps(batch(1)["unlabelled"]["second"])[-1]))
        again = method().training_step(batch(1))["contrast"]
    torch.testing.assert_close(again, contrast(query, key, queue, 0.07))


def test_a_step_with_more_keys_than_the_queue_holds_is_refused() -> None:
    with pytest.raises(UserError, match="raise method.queue"):
        method().prepare({"unlabelled": stream(Q + 1)})


def test_what_ships_is_the_student_with_its_own_head() -> None:
    made = method()
    assert isinstance(made.shipped(), AudioNTT) and made.shipped() is made.student


def steps(rank: int, world: int) -> tuple[Tensor, list[Tensor]]:
    """The queue, and the averaged gradients of the last step, after steps on this process's share."""
    made = convert_sync_batchnorm(method())
    assert isinstance(made, DeLoResM)
    mine = slice(rank * 2 * B // world, (rank + 1) * 2 * B // world)
    for step in range(2):
        made.zero_grad()
        losses = made.training_step(batch(step, mine))
        (losses["contrast"] + 1e-2 * losses["barlow"]).backward()
    average_gradients(made.parts()["student"])
    return made.queue, [p.grad for p in made.parts()["student"] if p.grad is not None]


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    queue, gradients = steps(rank, 2)
    torch.save([queue, *gradients], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_queue_and_gradients_of_one_with_the_double_batch(tmp_path: Path) -> None:
    mp.spawn(run, args=(str(tmp_path),), nprocs=2)
    queue, gradients = steps(0, 1)
    for rank in range(2):
        other_queue, *others = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(other_queue, queue, atol=1e-5, rtol=1e-4)
        for other, gradient in zip(others, gradients, strict=True):
            torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-3)


def test_a_step_reads_nothing_back_from_the_device() -> None:
    made = method().to("meta")
    first = torch.empty(B, 1, M, T, device="meta")
    losses = made.training_step({"unlabelled": {"first": first, "second": first}})
    sum(losses.values()).backward()
    made.after_step()
    assert made.weights.keys() <= losses.keys()
    assert all(isinstance(m, nn.Module) for m in made.networks())
