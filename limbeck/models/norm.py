"""BatchNorm whose statistics span all processes, on any device.

Shapes: B samples, C channels, and any number of further axes (...).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limbeck.distributed import gather_with_gradient, world_size


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm over the concatenated batch of all processes, in output, gradient and running statistics.

    On CUDA it is torch's own SyncBatchNorm, which knows no other device. Elsewhere each process contributes its
    count n_i, mean m_i and variance v_i: mean = sum n_i m_i / n, variance = sum n_i (v_i + (m_i - mean)^2) / n,
    in float32, and the gradient flows through both to every process. In eval mode or in a single process it is
    plain BatchNorm. Batches may differ in size between processes. State-dict keys are BatchNorm's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        if not self.training or world_size() == 1:
            return _BatchNorm.forward(self, x)
        self._check_input_dim(x)
        mean_C, var_C, count = self._global_statistics(x)
        if self.track_running_stats:
            self._update_running(mean_C.detach(), var_C.detach(), count)
        shape = [1, -1] + [1] * (x.ndim - 2)
        out = (x.float() - mean_C.view(shape)) * torch.rsqrt(var_C + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @staticmethod
    def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        var_C, mean_C = torch.var_mean(x.float(), dims, correction=0)
        count = mean_C.new_full((1,), x.numel() // x.shape[1])
        parts = gather_with_gradient(torch.cat([mean_C, var_C, count]).unsqueeze(0))
        means_PC, vars_PC, counts_P1 = parts.split([x.shape[1], x.shape[1], 1], dim=1)
        weights_P1 = counts_P1 / counts_P1.sum()
        mean_C = (weights_P1 * means_PC).sum(0)
        var_C = (weights_P1 * (vars_PC + (means_PC - mean_C) ** 2)).sum(0)
        return mean_C, var_C, counts_P1.sum().detach()

    @torch.no_grad()
    def _update_running(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        # Without a momentum, BatchNorm keeps the plain average over all batches.
        share = 1.0 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.add_(share * (mean_C - self.running_mean))
        unbiased_C = var_C * (count / (count - 1))
        self.running_var.add_(share * (unbiased_C - self.running_var))


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replaces every BatchNorm in `module` by `SyncBatchNorm`, in place, and returns it.

    Parameters and buffers are the same tensors, so optimisers and state dicts stay valid.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child))
    return module


def _synchronised(norm: _BatchNorm) -> SyncBatchNorm:
    made = SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    made._parameters = dict(norm._parameters)
    made._buffers = dict(norm._buffers)
    return made.train(norm.training)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """The model, put in train mode for its BatchNorm layers alone: batch statistics, but no dropout and no drop-path.

    Forward passes move its running statistics. Official codes of mean teachers in segmentation label like this.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return model
