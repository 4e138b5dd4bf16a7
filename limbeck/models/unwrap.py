"""Looking through the wrappers around a network: compiled, distributed, normalised."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from limbeck.models.normalize import Normalized


class LogitsOf(nn.Module):
    """Base of the wrappers that turn a transformers model into `input -> logits_BC`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """`model` itself, then what it wraps, down to the network: for names that ignore the wrappers.

    Knows `torch.compile` (`_orig_mod`), DDP (`module`), Lightning Fabric (`_forward_module`) and
    Limbeck's own `Normalized` and transformers wrappers (`model`).
    """
    while True:
        yield model
        if isinstance(model, Normalized | LogitsOf):
            model = model.model
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            children = dict(model.named_children())
            inner = children.get("_orig_mod", children.get("_forward_module"))
            if inner is None:
                return
            model = inner


def core_network(model: nn.Module) -> nn.Module:
    """The innermost network, without wrappers; parameters are shared with `model`."""
    *_, core = layers_of_wrapping(model)
    return core
