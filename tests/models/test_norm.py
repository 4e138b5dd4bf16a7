"""SyncBatchNorm in one process; across processes it is in test_two_processes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from limbeck.models import SmallCnn, SyncBatchNorm, convert_sync_batchnorm, resnet20


def test_in_one_process_it_is_plain_batchnorm():
    model = resnet20()
    synchronised = convert_sync_batchnorm(copy.deepcopy(model))
    image = torch.rand(4, 3, 8, 8)
    for mode in (True, False):
        torch.testing.assert_close(synchronised.train(mode)(image), model.train(mode)(image))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(synchronised.state_dict()[key], value)


def test_conversion_keeps_keys_tensors_mode_and_finds_every_norm():
    model = SmallCnn().eval()
    weight = model.stages[0][1].weight
    keys = list(model.state_dict())
    converted = convert_sync_batchnorm(model)
    assert converted is model
    assert model.stages[0][1].weight is weight
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, SyncBatchNorm) and not m.training for m in model.modules()) == 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_lone_batchnorm_is_converted():
    assert isinstance(convert_sync_batchnorm(nn.BatchNorm1d(3, affine=False)), SyncBatchNorm)
