"""Linear layers in int8, for inference on CPUs with VNNI: a scale per row of the weights, and one per token.

    embedder = load_embedder("sentence-transformers/all-MiniLM-L6-v2", dtype="int8")

y = s_t s_e (q_t . w_e) + b_e, with q_t and w_e in -127 to 127, and s_t computed as the token arrives, so that a text's
vector does not depend on its batch. Everything else (embeddings, norms, attention, pooling) stays in float32.

A few features of some layers' inputs are many times larger than the others, which then round to nothing. Where it
lowers the error of a layer's products on `SAMPLE` by a fifth, features are divided, and the weight's columns
multiplied, by sqrt(largest input / largest weight). Source: Xiao et al. 2023 (SmoothQuant), equation 4.

all-MiniLM-L6-v2 takes 0.47 of float32's CPU time for SciFact's queries and Uber's chunks, 0.48 for finance contexts;
the least cosine to float32 of these texts and of 790 questions about Uber is 0.9976.
Its weights take 56 MiB instead of 86, token vectors being 45 of them; once it encodes, 10 MiB more instead of 41, for
weights in oneDNN's order (a busy core of an EPYC of family 25, torch 2.13.0, 2026-11-30). What was worse is in
experiments/LOG.md.

Shapes: T tokens, D features in, E features out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..device import has_int8_linear
from .layers import ACTIVATIONS, Linear

TINY = 1e-20  # the least largest value, so that a row of zeros has a scale
# By the name in config.json; new memory for the output would take as long as the activation itself.
IN_PLACE = {"gelu": torch.ops.aten.gelu_, "relu": torch.relu_, "tanh": torch.tanh_}
NO_TRAINING = "the model's dtype is int8, which is for inference alone: load it in float32"
WORTH = 0.8  # of the error without division of features: with more, it stays undivided
SAMPLE = """The committee approved the annual budget on Tuesday, after revenue rose 12.5% to $3.4 billion.
What is the difference between a virus and a bacterium, and which of them do antibiotics treat?
To install the package, run the command below; it writes its settings to a folder named config (see section 2).
Inhibition of the protein reduced tumour growth in mice, but not in patients with the mutated gene.
She walked along the river until the lights of the harbour went out, and nobody ever asked her why.
how do I cancel my order
Common stock, par value $0.001 per share; 1,957,000 shares were outstanding as of December 31, 2021.
The match ended 2-1 when the striker, who had come on at half-time, scored from outside the box."""


class Int8Linear(nn.Module):
    """A `Linear` layer in int8: no gradient, and no change of weights. `divisor_D`: what features are divided by."""

    def __init__(self, layer: nn.Linear, divisor_D: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight_ED = layer.weight.detach().float()
        weight_ED = weight_ED if divisor_D is None else weight_ED * divisor_D
        scale_E = weight_ED.abs().amax(1).clamp_(min=TINY) / 127
        weight_ED = (weight_ED / scale_E[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(weight_ED, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float(), requires_grad=False)
        self.register_buffer("scale", scale_E)
        self.register_buffer("factor", None if divisor_D is None else 1 / divisor_D)
        self.packed: tuple[Tensor, Tensor] | None = None  # the weight in oneDNN's order, and zeros [E]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None}  # which cannot be copied

    def forward(self, x_TD: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x_TD.requires_grad:
            raise ValueError(NO_TRAINING)
        own = None if self.factor is None else x_TD * self.factor  # a copy, to work in place
        x_TD = x_TD if own is None else own
        bound_T1 = torch.maximum(x_TD.amax(1, keepdim=True), -x_TD.amin(1, keepdim=True)).clamp_(min=TINY)
        # By way of int8, to which torch converts eight times as fast as to uint8.
        q_TD = torch.mul(x_TD, 127 / bound_T1, out=own).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        y_TE, scale_T1 = self._products(q_TD), bound_T1 / 127
        return y_TE.mul_(scale_T1) if self.bias is None else torch.addcmul(self.bias, y_TE, scale_T1, out=y_TE)

    def activated(self, x_TD: Tensor, activation: str) -> Tensor:
        """As `Linear.activated`."""
        y_TE, in_place = self(x_TD), IN_PLACE.get(activation)
        return in_place(y_TE) if in_place and not torch.is_grad_enabled() else ACTIVATIONS[activation](y_TE)

    def _products(self, q_TD: Tensor) -> Tensor:
        """s_e ((q_t - 128) . w_e), [T, E] float32."""
        if self.packed is None:
            # Signed activations would do without the 128, but their kernel is hundreds of times slower.
            order = torch.ops.onednn.qlinear_prepack(self.weight, list(q_TD.shape))
            self.packed = order, torch.zeros(self.out_features, dtype=torch.int64)
        weight, zeros_E = self.packed
        how = 1.0, 0, torch.float32, "none", [], ""  # output scale and zero point, type, activation
        return torch.ops.onednn.qlinear_pointwise(q_TD, 1.0, 128, weight, self.scale, zeros_E, None, *how)


def to_int8(embedder: nn.Module) -> None:
    """Turns the Linear layers of an Embedder's encoders into int8, in place; both sides', if queries have their own.
    Raises `ValueError` where oneDNN lacks int8 products, for LoRA, and for an encoder without such layers."""
    if not has_int8_linear(embedder.device):
        raise ValueError(
            f"dtype is int8, expected another: {embedder.device} has no fast int8 products (x86 with VNNI)"
        )
    for side in {embedder.side(role) for role in ("query", "document")}:
        if side.lora is not None:
            raise ValueError("dtype is int8, but the model has LoRA: merge it, save the model, and load that")
        layers = {name: part for name, part in side.encoder.named_modules() if type(part) is Linear}
        if not layers:
            raise ValueError("dtype is int8, which is for Linear layers, but the encoder has none")
        divisors = _divisors(side, layers)
        for name, layer in layers.items():
            side.encoder.set_submodule(name, Int8Linear(layer, divisors.get(name)))
        side.encoder.requires_grad_(False)


@torch.no_grad()
def _divisors(side: nn.Module, layers: dict[str, Linear]) -> dict[str, Tensor]:
    """What the features of a layer's input are divided by, [D], for each layer where that is worth it."""
    found, handles = {}, []

    def watch(name: str, layer: Linear, x_TD: Tensor) -> None:
        x_TD = x_TD.float()
        input_D, weight_D = (x.abs().amax(0).clamp_(min=1e-5) for x in (x_TD, layer.weight.float()))
        divisor_D, exact_TE = (input_D / weight_D).sqrt(), layer.weight.float() @ x_TD.T
        plain, divided = (
            (Int8Linear(layer, divisor)(x_TD).T - exact_TE - (0 if layer.bias is None else layer.bias[:, None])).norm()
            for divisor in (None, divisor_D)
        )
        if divided < WORTH * plain:
            found[name] = divisor_D

    try:
        for name, layer in layers.items():
            hook = lambda layer, inputs, name=name: watch(name, layer, inputs[0])  # noqa: E731
            handles.append(layer.register_forward_pre_hook(hook))
        side.embed(side.pack(SAMPLE.splitlines(), role="document"), role="document")
    finally:
        for handle in handles:
            handle.remove()
    return found
