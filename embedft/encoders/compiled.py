"""Layers compiled by torch.compile, behind attention: projection, norms, feed-forward and dropout in few kernels.

    compile_layers(embedder)            # then encode, or train; a line on stderr for each graph that is compiled

One graph serves all layers and all numbers of tokens; inference, training and each precision have their own, of which
torch compiles `torch._dynamo.config.recompile_limit` (8) at most and says so when it goes on without. Attention stays
as it is: its groups differ from batch to batch. Layers with hooks, LoRA's say, are not compiled. Meant for GPUs: on a
CPU, in bfloat16, it took longer (experiments/LOG.md).
"""

import functools
import itertools
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..objects import in_one_line
from .dtypes import dtype_of


def compile_layers(embedder: nn.Module, *, backend: str = "inductor") -> None:
    """Compiles the layers of the embedder's or cross-encoder's encoder from their next call on, in place. Raises
    `ValueError` for layers without `after_attention`, and where torch.compile finds no compiler."""
    encoder = getattr(embedder, "encoder", embedder)  # what is behind an API has none
    layers = getattr(encoder, "layers", None)
    if not layers or not all(hasattr(layer, "after_attention") for layer in layers):
        raise ValueError(f"compile is true, but {type(encoder).__name__} has no layers with a part behind attention")
    if dtype_of(embedder) == "int8":
        raise ValueError("compile is true, which cannot be combined with int8")
    with in_one_line("compile is true, but torch.compile does not work here"):
        torch.compile(torch.neg, backend=backend)(torch.zeros(2, device=embedder.device))
    numbers = itertools.count(1)

    def announcing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        start = time.perf_counter()
        compiled = torch._dynamo.lookup_backend(backend)(graph, inputs)
        seconds = time.perf_counter() - start
        print(f"torch.compile: graph {next(numbers)}, {seconds:.1f} s", file=sys.stderr, flush=True)
        return compiled

    for kind in {type(layer) for layer in layers}:
        compiled = torch.compile(kind.after_attention, backend=announcing)
        for layer in layers:
            if type(layer) is kind:
                layer.after_attention = functools.partial(_for_all_lengths, compiled, layer)


def _for_all_lengths(compiled: Callable, layer: nn.Module, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
    if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules()):
        # torch.compile does not notice hooks that come or go, such as LoRA's.
        return type(layer).after_attention(layer, x_TD, attended_TD)
    for x in (x_TD, attended_TD):
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return compiled(layer, x_TD, attended_TD)
