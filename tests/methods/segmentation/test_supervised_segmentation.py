"""Plain training on masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from limbeck.data import Samples, Stream, make_view
from limbeck.errors import UserError
from limbeck.methods.segmentation.supervised_segmentation import SupervisedSegmentation
from limbeck.models import MiniDeepLab
from limbeck.train import Optimizer, Trainer, fit

B, C, H, W = 4, 3, 16, 24


def samples(classes: int = C) -> Samples:
    mask = torch.zeros(B, H, W, dtype=torch.uint8)
    mask[:, :, W // 2 :] = 1
    mask[:, : H // 4] = 255
    image = (mask[:, None].expand(-1, 3, -1, -1) == 1).to(torch.uint8) * 200
    return Samples({"image": image, "mask": mask}, [str(c) for c in range(classes)])


def stream(classes: int = C) -> Stream:
    return Stream(samples(classes), B, {"weak": make_view("identity")})


def student() -> MiniDeepLab:
    torch.manual_seed(0)
    return MiniDeepLab(C, channels=(4, 8, 8))


def test_the_loss_is_the_mean_over_pixels_with_a_class():
    net = student().eval()
    picture, mask = torch.rand(B, 3, H, W), samples().fields["mask"]
    losses = SupervisedSegmentation(net).training_step({"labelled": {"weak": picture, "weak_mask": mask}})
    torch.testing.assert_close(losses["ce"], F.cross_entropy(net(picture), mask.long(), ignore_index=255))


def test_it_learns_two_halves_of_a_picture():
    net = student()
    before = fit_accuracy(net)
    trainer = Trainer(steps=40, optimizer=Optimizer(lr=0.05), accelerator="cpu")
    fit(SupervisedSegmentation(net), {"labelled": stream()}, trainer)
    assert fit_accuracy(net) > max(0.9, before)


def fit_accuracy(net: MiniDeepLab) -> float:
    part = samples()
    with torch.no_grad():
        predicted = net.eval()(part.fields["image"].float() / 255).argmax(1)
    kept = part.fields["mask"] != 255
    return float((predicted == part.fields["mask"])[kept].float().mean())


def test_masks_of_other_classes_than_the_students_are_refused():
    trainer = Trainer(steps=1, accelerator="cpu")
    with pytest.raises(UserError, match="has 3 classes and the masks 5"):
        fit(SupervisedSegmentation(student()), {"labelled": stream(classes=5)}, trainer)


def test_samples_without_masks_are_refused():
    bare = Stream(samples().without("mask"), B, {"weak": make_view("identity")})
    with pytest.raises(UserError, match="reads the field 'mask' .*add it to the stream's samples"):
        fit(SupervisedSegmentation(student()), {"labelled": bare}, Trainer(steps=1, accelerator="cpu"))
