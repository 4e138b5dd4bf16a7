"""CV-DD: several networks vote on the pixels and on the labels of a small synthetic training set.

Cui et al.: Dataset Distillation via Committee Voting, 2025 (arXiv 2501.07575). Three stages:

Recover, for each picture index i one picture x of each class, from real crops; with the committee of i, weights
w = softmax(prior / 5), x' = a random crop, flip and roll of x, z_l the input of BatchNorm layer l:

    min_x sum_k w_k ( CE(g_k(x'), y) + alpha sum_l c_l (||var(z_l) - running_var_l|| + ||mean(z_l) - running_mean_l||) )

Relabel (batch-specific soft labels): every batch of every epoch is cropped, flipped and mixed once; all networks label
it by the statistics of that half batch, label = sum_k softmax(prior / 10)_k logits_k, and all that was drawn is stored.

Validate: a new network is trained on the replayed batches by KL(softmax(label / T) || softmax(logits / T)), no T^2.

One network alone is the paper's baseline SRe2L++ (`members: [0]`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data import Data, MultiCrop, Samples, Stream
from limbeck.data.replay import PADDING, Replay, draw_replay, present, stored_bytes
from limbeck.distributed import gather, rank, world_size
from limbeck.errors import UserError, require_positive
from limbeck.labels.votes import seats, vote_weights
from limbeck.losses import kl_divergence
from limbeck.models.statistics import forward_with_statistics, statistics_distance
from limbeck.teachers import Ensemble, Frozen, Teacher
from limbeck.teachers.patches import realistic_patches
from limbeck.train import Batch, Losses, Method, Pictures, Stage, Workspace


def inversion_loss(
    networks: Sequence[nn.Module],
    weights_K: Tensor,
    images_BCHW: Tensor,
    labels_B: Tensor,
    *,
    alpha: float,
    first_layer: float,
) -> Tensor:
    """sum_k w_k (CE + alpha R_k), R the distance of BatchNorm statistics; networks in eval mode."""
    total = images_BCHW.new_zeros(())
    for network, weight in zip(networks, weights_K, strict=True):
        logits_BC, found = forward_with_statistics(network, images_BCHW)
        ce = F.cross_entropy(logits_BC.float(), labels_B)
        total = total + weight * (ce + alpha * statistics_distance(found, first_layer))
    return total


def recover(
    networks: Sequence[nn.Module],
    weights_K: Tensor,
    start_BCHW: Tensor,
    labels_B: Tensor,
    *,
    mean_C: Tensor,
    std_C: Tensor,
    iterations: int = 4000,
    lr: float = 0.25,
    alpha: float = 0.01,
    first_layer: float = 10.0,
    jitter: int = 4,
) -> Tensor:
    """uint8 [B,C,H,W]: pictures of these labels, optimised from `start_BCHW` (uint8).

    Adam works on pixels normalised by `mean_C` and `std_C`, whose valid range they are clamped to after every step; the
    learning rate falls to 0 by a cosine. One crop, flip and roll for the whole batch in each iteration.
    """
    mean, std = mean_C.view(-1, 1, 1), std_C.view(-1, 1, 1)
    low, high = -mean / std, (1 - mean) / std
    pixels = ((start_BCHW.float() / 255 - mean) / std).requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=lr, betas=(0.5, 0.9), eps=1e-8)
    crop = MultiCrop(crops=1, scale=(0.08, 1.0))
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
        drawn = {name: value.expand(len(pixels), *value.shape[1:]) for name, value in crop.draw(pixels[:1]).items()}
        seen = crop.apply(pixels * std + mean, drawn)[:, 0]
        seen = seen.roll(torch.randint(0, jitter + 1, (2,)).tolist(), (2, 3))
        loss = inversion_loss(networks, weights_K, seen, labels_B, alpha=alpha, first_layer=first_layer)
        (pixels.grad,) = torch.autograd.grad(loss, pixels)
        optimizer.step()
        with torch.no_grad():
            pixels.copy_(pixels.maximum(low).minimum(high))
    return ((pixels.detach() * std + mean) * 255).round().to(torch.uint8)


def relabel(teacher: Teacher, pictures_NCHW: Tensor, replay: Replay) -> Tensor:
    """float16 [E M, B, C]: logits of every stored batch, each half of it labelled by itself; 0 in padded rows.

    The teacher sees the mixed pixels themselves: what it labels is what the student will see.
    """
    found = []
    for batch in replay.batches(pictures_NCHW):
        halves = [
            teacher.logits({"image": half}, "image") for half in batch.tensor_split([len(batch) // 2]) if len(half)
        ]
        logits = torch.cat(halves)
        found.append(F.pad(logits, (0, 0, 0, replay.picture.shape[1] - len(logits))))
    return torch.stack(found).half()


class LearnReplayed(Method):
    """Train on stored batches: the pixels that were labelled, in the groups whose statistics made the labels.

    A sample of the stream is one batch; several processes take different batches at each step, as accumulation would.

    Args:
        student: pictures to logits; trained from scratch.
        pictures_NCHW: uint8, the synthetic pictures.
        temperature: of both distributions; the loss has no T^2.
        classes: of the pictures; labels are float16 [B, classes].
    """

    streams = {"batches": ("picture", "box", "flip", "partner", "cut", "logits")}
    epoch_stream = "batches"

    pictures_NCHW: Tensor

    def __init__(
        self, student: nn.Module, pictures_NCHW: Tensor, *, temperature: float = 20.0, batch_size: int = 16
    ) -> None:
        super().__init__()
        require_positive(temperature=temperature)
        self.student, self.temperature = student, temperature
        self.batch_size, self.per_epoch = batch_size, -(-len(pictures_NCHW) // batch_size)
        self.register_buffer("pictures_NCHW", pictures_NCHW, persistent=False)

    def rows_now(self) -> int:
        """How many rows this process's batch has: only the last one of each epoch may be short."""
        number = (self.clock.step * world_size() + rank()) % self.per_epoch
        return min(self.batch_size, len(self.pictures_NCHW) - number * self.batch_size)

    def training_step(self, batch: Batch) -> Losses:
        stored = {name: column[0] for name, column in batch["batches"].items() if name != "index"}
        images, half = present(self.pictures_NCHW, stored, rows := self.rows_now()), self.batch_size // 2
        parts = zip(images.split(half), stored["logits"][:rows].float().split(half), strict=True)
        # Two accumulation steps in the official code, and a short batch is divided by 2 as well.
        losses = [self._loss(part, labels) / 2 for part, labels in parts]
        return {"kl": torch.stack(losses).sum()}

    def _loss(self, images: Tensor, labels_BC: Tensor) -> Tensor:
        return kl_divergence(
            self.student(images), labels_BC, temperature=self.temperature, scale_by_t2=False, reduction="batchmean"
        )


def cv_dd(
    ws: Workspace,
    data: Data,
    student: nn.Module,
    first: nn.Module,
    second: nn.Module | None = None,
    third: nn.Module | None = None,
    fourth: nn.Module | None = None,
    fifth: nn.Module | None = None,
    *,
    validate: Stage,
    ipc: int = 10,
    priors: tuple[float, ...] | None = None,
    members: tuple[int, ...] | None = None,
    voters: int = 2,
    committee: Literal["best", "walk", "random"] = "walk",
    voting: Literal["prior", "equal", "random"] = "prior",
    pixel_temperature: float = 5.0,
    label_temperature: float = 10.0,
    iterations: int = 4000,
    lr: float = 0.25,
    alpha: float = 0.01,
    first_layer: float = 10.0,
    jitter: int = 4,
    epochs: int = 300,
    batch_size: int = 16,
    label_statistics: Literal["batch", "running"] = "batch",
    temperature: float = 20.0,
    start: Literal["patches", "noise"] = "patches",
) -> nn.Module:
    """All stages. Ships the student, an architecture that no voter needs to have.

    Args:
        student: trained from scratch on the synthetic set.
        first, second, third, fourth, fifth: trained networks with BatchNorm layers.
        validate: trainer of the student; one epoch of it is all stored epochs.
        ipc: synthetic pictures of each class.
        priors: score of each network in percent: the accuracy of a student of that network's synthetic set alone. None:
            all stages are run once for each network first, and its student is scored on real training pictures, which
            it has not seen.
        members: which networks vote, numbered from 0; None: all. One alone is SRe2L++.
        voters, committee: how many networks make a picture, and which for index 0, 1, ...: the `best` (the paper at ipc
            1), a `walk` over all committees (ipc 10), or `random` ones (ipc 50).
        voting, pixel_temperature, label_temperature: how votes are weighted.
        iterations, lr, alpha, first_layer, jitter: see `recover`; the paper's jitter is 4 up to 64 pixels, 32 at 224.
        epochs, batch_size: what is stored.
        label_statistics: `batch`, as the paper labels; `running`, networks in eval mode (an ablation).
        temperature: see `LearnReplayed`.
        start: crops of medium difficulty, or Gaussian noise (an ablation).

    Raises:
        UserError: priors or members do not fit the networks.
    """
    every = [network for network in (first, second, third, fourth, fifth) if network is not None]
    chosen = tuple(range(len(every))) if members is None else members
    if not chosen or min(chosen) < 0 or max(chosen) >= len(every):
        raise UserError(f"members are {list(chosen)}, and there are {len(every)} networks, numbered from 0")
    if priors is not None and len(priors) != len(every):
        raise UserError(f"there are {len(priors)} priors for {len(every)} networks; give one each")

    def distil(networks: list[nn.Module], scores: list[float], learner: nn.Module, prefix: str = "") -> LearnReplayed:
        """Recover, relabel and validate with these networks."""

        def make_pictures() -> dict[str, Tensor]:
            best = Frozen(networks[max(range(len(scores)), key=scores.__getitem__)])
            starts = starting_pictures(best, data, ipc, start)
            mean_C, std_C = pixel_statistics(data)
            made = []
            for index in range(rank(), ipc, world_size()):  # indices are independent: processes share them
                torch.manual_seed(ws.seed * 100_003 + index)
                sitting = seats(index, scores, min(voters, len(scores)), committee)
                made.append(
                    recover(
                        [networks[k] for k in sitting],
                        vote_weights([scores[k] for k in sitting], pixel_temperature, voting),
                        starts[:, index],
                        torch.arange(data.num_classes),
                        mean_C=mean_C,
                        std_C=std_C,
                        iterations=iterations,
                        lr=lr,
                        alpha=alpha,
                        first_layer=first_layer,
                        jitter=jitter,
                    )
                )
            return {"pictures": together(made, ipc, starts)}

        pictures = ws.compute(f"{prefix}recover", make_pictures)["pictures"]

        def make_labels() -> dict[str, Tensor]:
            voices = [Frozen(copy.deepcopy(n), batch_statistics=label_statistics == "batch") for n in networks]
            weights = vote_weights(scores, label_temperature, voting).tolist()
            size = (pictures.shape[-2], pictures.shape[-1])
            replay = draw_replay(len(pictures), size, epochs=epochs, batch_size=batch_size)
            return {**replay.columns(), "logits": relabel(Ensemble(voices, weights=weights), pictures, replay)}

        stored = ws.compute(f"{prefix}relabel", make_labels)
        batches = Stream(Samples(stored), 1, shuffle=False, view_field="picture")
        method = LearnReplayed(learner, pictures, temperature=temperature, batch_size=batch_size)
        ws.fit(f"{prefix}validate", method, {"batches": batches}, validate.trainer)
        ws.measure(f"{prefix}stored", lambda: storage(pictures, stored, data))
        return method

    def prior(number: int) -> float:
        """What a network is worth: the accuracy on real pictures of a student of its synthetic set alone."""
        name = f"prior-{number}."
        alone = distil([networks[number]], [0.0], copy.deepcopy(student), name)
        return ws.measure(f"{name}score", lambda: {"percent": accuracy(alone.shipped().cpu(), data)})["percent"]

    networks = [network.cpu().eval().requires_grad_(False) for network in every]
    scores = [prior(number) if priors is None else priors[number] for number in chosen]
    method = distil([networks[number] for number in chosen], scores, student)
    names = [str(name) for name in data.classes or range(data.num_classes)]
    ws.show("Synthetic pictures, index by index", Pictures(method.pictures_NCHW.cpu(), names * ipc))
    return method.shipped()


def together(made: Sequence[Tensor], ipc: int, starts: Tensor) -> Tensor:
    """uint8 [ipc C, ...], index by index: the pictures of all processes, of which each made every W-th index."""
    share = -(-ipc // world_size())
    empty = torch.zeros_like(starts[:, 0])
    mine = torch.stack([*made, *[empty] * (share - len(made))])
    everyone = gather(mine).reshape(world_size(), share, *mine.shape[1:]).transpose(0, 1).flatten(0, 1)
    return everyone[:ipc].flatten(0, 1)


def starting_pictures(teacher: Teacher, data: Data, ipc: int, start: Literal["patches", "noise"]) -> Tensor:
    """uint8 [C, ipc, channels, H, W]: crops of real pictures of medium difficulty, or noise of the data's range."""
    if start == "patches":
        return realistic_patches(teacher, data.train, per_class=ipc, difficulty="medium")
    mean_C, std_C = pixel_statistics(data)
    shape = (data.num_classes, ipc, *data.train.batch(torch.arange(1))["image"].shape[1:])
    noise = torch.randn(shape) * std_C.view(-1, 1, 1) + mean_C.view(-1, 1, 1)
    return (noise.clamp(0, 1) * 255).round().to(torch.uint8)


def pixel_statistics(data: Data) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over up to 1,000 training pictures, in [0, 1]."""
    images = data.train.batch(torch.arange(min(1000, len(data.train))))["image"].float() / 255
    return images.mean((0, 2, 3)), images.std((0, 2, 3))


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    """Per cent of up to 1,000 training pictures that a network classifies rightly."""
    samples = data.train.batch(torch.arange(min(1000, len(data.train))))
    right = network.eval()(samples["image"].float() / 255).argmax(-1) == samples["label"]
    return 100 * float(right.float().mean())


def storage(pictures: Tensor, stored: dict[str, Tensor], data: Data) -> dict[str, float]:
    """Bytes of the synthetic pictures, of their labels and of the drawn augmentations, and of the real pictures."""
    each = stored_bytes([data.train.batch(torch.arange(1))["image"]])
    drawn = {name: value for name, value in stored.items() if name != "logits"}
    rows = stored["picture"] != PADDING
    found = {
        "picture_bytes": stored_bytes([pictures]),
        "label_bytes": int(rows.sum()) * stored["logits"].shape[-1] * stored["logits"].element_size(),
        "replay_bytes": stored_bytes(drawn),
    }
    return {**found, "bytes": sum(found.values()), "real_bytes": each * len(data.train)}
