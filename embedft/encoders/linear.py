"""The linear layer of every encoder: oneDNN's kernel on the CPU in float32, PyTorch's own elsewhere.

`device.has_onednn_linear` says what it gains. The derivative is written out because the operator has none; it cannot be
differentiated twice.

Shapes: T tokens, D features in, E features out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..device import has_onednn_linear


class Linear(nn.Linear):
    """y = x W^T + b over x [T, D]; parameters as in torch.nn.Linear."""

    def forward(self, x_TD: Tensor) -> Tensor:
        if has_onednn_linear(x_TD.device, x_TD.dtype):
            return _OneDNNLinear.apply(x_TD, self.weight, self.bias)
        return F.linear(x_TD, self.weight, self.bias)


def _product(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_TD, weight_ED, bias_E, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _product(x_TD, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x_TD = _product(grad_TE, weight_ED.t().contiguous()) if needs_x else None
        grad_weight_ED = _product(grad_TE.t(), x_TD.t()) if needs_weight else None
        return grad_x_TD, grad_weight_ED, grad_TE.sum(0) if needs_bias else None
