"""`torch.compile` in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_in_place(module: nn.Module) -> None:
    """Let `module(...)` run compiled; its class, names and weights stay what they are. A copy of it is not compiled.

    Like `module.compile()`, which silently leaves instances of torch's own classes as they are: dynamo does not begin a
    graph in torch's files, and the forward of an `nn.Sequential` stands there. So it begins in a function of ours.
    """
    call = module._call_impl

    def compiled(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # Dynamo counts recompilations by code object: each module needs its own, or many together meet the limit.
    compiled.__code__ = compiled.__code__.replace()
    module._compiled_call_impl = torch.compile(compiled)
