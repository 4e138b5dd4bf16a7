"""Inner features and attention weights by module name, without a change to the model."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.models.outputs import Outputs
from limbeck.models.unwrap import layers_of_wrapping

ATTENTION, INPUT = "@attention", "@input"


class _Enough(Exception):
    """Every tap has its tensor: the rest of the forward is not needed."""


class Taps:
    """`taps(x) -> Outputs`: what `model(x)` gives, and the tensors inside it by module name.

    `names` are dotted as in `model.named_modules()`; wrappers (`torch.compile`, DDP, `Normalized`, the
    transformers wrappers) may be spelled out or left out. `"layer2"` puts the module's output in
    `features["layer2"]`: the tensor itself, or of a tuple or transformers output the first entry (the hidden
    state). `"encoder.layer.3.attention.self@attention"` puts attention weights in
    `attention["encoder.layer.3.attention.self"]`: the second entry of what a transformers attention layer
    returns (load the model with `attn_implementation="eager"`, other implementations compute none), or the
    output of a module that returns only the weights (`blocks.0.attention.softmax` of `small_vit`).
    `"head@input"` puts what the module reads in `features["head@input"]`.

    With `stop_early` the forward ends as soon as the last named module has run, and `logits` is None; modules
    behind it (and their BatchNorm statistics) are not touched. A module that runs several times in one forward
    gives its first output.

    The tensors carry gradient and are copies, so in-place operations further on in the model do not change
    them. Hooks exist only during a call and only for the calling thread. Of a `torch.compile`d `model` the tapped
    forward is compiled by the same compiler; compiled parts further inside run uncompiled. Inside a compiled
    caller the call is a break in the caller's graph.

    Raises `UserError` for an unknown name (with the nearest one), for a module that gives no tensor or no
    attention weights, or one that the forward never reached; and for `stop_early` on a DDP model with gradient,
    whose gradients would not be synchronised.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], stop_early: bool = False) -> None:
        if isinstance(names, str) or not names:
            raise UserError(f"Taps takes a non-empty list of module names, got {names!r}.")
        self.model = model
        self.names = tuple(dict.fromkeys(names))
        self.stop_early = stop_early
        self._forward: Callable[[Any], Tensor | None] | None = None
        for name in self.names:
            find_module(model, _bare(name))

    # Hooks and a caller's graph do not mix: dynamo would freeze the hooks that it saw first.
    @torch.compiler.disable
    def __call__(self, x: Tensor | Mapping[str, Tensor]) -> Outputs:
        self._refuse_unsynchronised()
        taken: dict[str, Tensor] = {}
        if self._forward is None:
            self._forward = _forward_of(self.model)
        with self._hooks(taken):
            logits = self._forward(x)
        missed = [name for name in self.names if name not in taken]
        if missed:
            raise UserError(f"The forward never ran the tapped module '{missed[0]}'; tap one that it runs.")
        outputs = Outputs(logits=logits)
        for name in self.names:
            place = outputs.attention if name.endswith(ATTENTION) else outputs.features
            place[name.removesuffix(ATTENTION)] = taken[name]
        return outputs

    def __getstate__(self) -> dict[str, Any]:
        # A deep copy (an EMA teacher) must not run the original's model.
        return {**self.__dict__, "_forward": None}

    def _refuse_unsynchronised(self) -> None:
        wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in layers_of_wrapping(self.model))
        if self.stop_early and wrapped and torch.is_grad_enabled():
            raise UserError(
                "stop_early would end a DDP forward before it prepares to synchronise gradients; "
                "use stop_early=False, or no_grad for a model that does not train."
            )

    @contextmanager
    def _hooks(self, taken: dict[str, Tensor]) -> Iterator[None]:
        wanted = len(self.names) if self.stop_early else None
        handles = []
        try:
            for name in self.names:
                module = find_module(self.model, _bare(name))
                handles.append(module.register_forward_hook(_hook(name, taken, wanted)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _hook(name: str, taken: dict[str, Tensor], wanted: int | None) -> Callable[..., None]:
    """Copies the module's output to `taken[name]`; raises `_Enough` when `wanted` names have theirs."""
    owner = threading.get_ident()

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # Another thread's forward through the same model is none of ours. (Traced code has one thread.)
        if not torch.compiler.is_compiling() and threading.get_ident() != owner:
            return
        if name not in taken:
            pick = _attention_in if name.endswith(ATTENTION) else _hidden_state_in
            taken[name] = pick(inputs if name.endswith(INPUT) else output, name).clone()
        if len(taken) == wanted:
            raise _Enough

    return hook


def _bare(name: str) -> str:
    """The module's own name."""
    return name.removesuffix(ATTENTION).removesuffix(INPUT)


def _forward_of(model: nn.Module) -> Callable[[Any], Tensor | None]:
    """`model` as a function to its logits, or to None where the hooks end it; compiled the way `model` is.

    A compiled model's own code may have been made before the hooks were there and would not run them.
    """
    compiled = hasattr(model, "dynamo_ctx")
    inner = model.get_submodule("_orig_mod") if compiled else model

    def forward(x: Any) -> Tensor | None:
        try:
            return _logits_in(inner(x))
        except _Enough:
            return None

    if compiled:
        return cast(Any, model).dynamo_ctx(forward)
    if not any(hasattr(m, "dynamo_ctx") or m._compiled_call_impl is not None for m in model.modules()):
        return forward

    def forward_uncompiled(x: Any) -> Tensor | None:
        with torch.compiler.set_stance("force_eager"):
            return forward(x)

    return forward_uncompiled


def _hidden_state_in(output: Any, name: str) -> Tensor:
    first = output if isinstance(output, Tensor) else _entry(output, 0)
    if not isinstance(first, Tensor):
        raise UserError(f"The tapped module '{name}' gives a {type(output).__name__} without a tensor in front.")
    return first


def _attention_in(output: Any, name: str) -> Tensor:
    weights = output if isinstance(output, Tensor) else _entry(output, 1)
    if not isinstance(weights, Tensor):
        raise UserError(
            f"'{name}' gives no attention weights; load the model with attn_implementation='eager', or tap the "
            "module that computes them."
        )
    return weights


def _entry(output: Any, position: int) -> Any:
    """An entry of a tuple, a list or a transformers output (which counts its entries as a tuple does)."""
    entries = output.to_tuple() if hasattr(output, "to_tuple") else output
    if isinstance(entries, tuple | list) and len(entries) > position:
        return entries[position]
    return None


def _logits_in(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that dotted name in `model` or in what it wraps; `UserError` with the nearest name if none."""
    bare = name.removeprefix("_orig_mod.").removeprefix("module.")
    levels = list(layers_of_wrapping(model))
    for wanted in (name, bare):
        for level in levels:
            try:
                if wanted:
                    return level.get_submodule(wanted)
            except AttributeError:
                continue
    known = [key for key, _ in levels[-1].named_modules() if key]
    nearest = difflib.get_close_matches(bare, known, n=1, cutoff=0.0)
    hint = f"; the nearest name is '{nearest[0]}'" if nearest else ""
    raise UserError(f"{type(levels[-1]).__name__} has no module '{name}'{hint} (see model.named_modules()).")
