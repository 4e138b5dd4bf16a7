"""The classifier at the end of a network: find it, count its classes, take it off.

Shapes: B samples, D width of the pooled feature, C classes.
"""

from __future__ import annotations

from torch import nn

from limbeck.errors import UserError
from limbeck.models.unwrap import core_network


def split_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """`(backbone, head)` with `head(backbone(x))` equal to what `model(x)` was.

    `backbone` is `model` itself, in which an identity has taken the head's place: it gives the pooled feature
    [B, D] that the head read. Parameters are shared, nothing is copied; deep-copy the model first to keep it
    whole. Raises `UserError` when the model has no final `nn.Linear`.
    """
    head = find_head(model)[1]
    name = next(name for name, module in model.named_modules() if module is head)
    if not name:
        return nn.Identity(), head
    model.set_submodule(name, nn.Identity())
    core = core_network(model)
    if hasattr(core, "origin"):
        # It is no longer the named architecture, so `save_model` must not say so.
        del core.origin
    return model, head


def class_count(model: nn.Module) -> int | None:
    """Number of classes C of a classifier: the width of its head. None where there is no linear head to tell."""
    try:
        return find_head(model)[1].out_features
    except UserError:
        return None


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name (within the innermost network) and module of the final classifier.

    timm's `get_classifier()` if there is one; otherwise the last `nn.Linear` in the order of registration whose
    width is the class count that the network states (`config.num_labels` of transformers, `num_classes`), or
    simply the last one of a network that states none. Raises `UserError` when there is none.
    """
    core = core_network(model)
    linears = [(name, m) for name, m in core.named_modules() if isinstance(m, nn.Linear)]
    get_classifier = getattr(core, "get_classifier", None)
    if callable(get_classifier):
        linears = [(name, m) for name, m in linears if m is get_classifier()]
    else:
        stated = getattr(getattr(core, "config", None), "num_labels", getattr(core, "num_classes", None))
        if isinstance(stated, int):
            linears = [(name, m) for name, m in linears if m.out_features == stated]
    if not linears:
        raise UserError(
            f"{type(core).__name__} has no linear classifier at its end; give a classification model whose head "
            "is an nn.Linear."
        )
    return linears[-1]
