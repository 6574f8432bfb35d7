"""The classification heads of families, from a pooled vector to a score: their settings in config.json, their names.

    layout = find_layout(path, "modernbert")
    head, pooling = build_head(layout, encoder.config, values, path)

Shapes: P pairs, D features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .adapter import naming
from .layers import ACTIVATIONS, Dropout, Linear
from .pooling import Pooling
from .schema import BOOL, COUNT, TEXT, Schema, check


@dataclass(frozen=True)
class Layout:
    """A family's head in checkpoints: out(norm(activation(dense(x)))), without the modules whose names are "".
    A field of config.json prevails where there is one: `classifier_activation`, `classifier_pooling`."""

    prefix: str  # before the encoder's tensors
    out: str
    dense: str = ""
    norm: str = ""
    activation: str = "tanh"
    pooling: str = "cls"
    biased: tuple[str, ...] = ("dense", "norm", "out")
    dropout: str = "classifier_dropout"  # the field of its probability
    default_dropout: float | None = None  # None: that of the encoder's hidden states
    drops_pooled: bool = False  # whether dropout precedes `dense`, too; it always precedes `out`

    def names(self) -> dict[str, str]:
        """{our module: the checkpoint's}."""
        return {field: name for field in ("dense", "norm", "out") if (name := getattr(self, field))}


ROBERTA = Layout("roberta.", dense="classifier.dense", out="classifier.out_proj", drops_pooled=True)
DECODER = Layout("model.", out="score", pooling="lasttoken", biased=(), dropout="", default_dropout=0.0)
CLASSIFIER = "ForSequenceClassification"
# By `model_type` of config.json.
LAYOUTS = {
    "bert": Layout("bert.", dense="pooler.dense", out="classifier"),
    "roberta": ROBERTA,
    "camembert": ROBERTA,
    "xlm-roberta": ROBERTA,
    "distilbert": Layout(
        "distilbert.",
        dense="pre_classifier",
        activation="relu",
        out="classifier",
        dropout="seq_classif_dropout",
        default_dropout=0.2,
    ),
    "electra": Layout(
        "electra.", dense="classifier.dense", activation="gelu", out="classifier.out_proj", drops_pooled=True
    ),
    "mpnet": Layout(
        "mpnet.",
        dense="classifier.dense",
        out="classifier.out_proj",
        dropout="hidden_dropout_prob",
        drops_pooled=True,
    ),
    "nomic_bert": Layout("nomic_bert.", dense="pooler.dense", out="classifier"),
    "new": Layout("new.", dense="pooler.dense", out="classifier"),
    "gte": Layout("gte.", dense="pooler.dense", out="classifier"),
    "modernbert": Layout(
        "model.",
        dense="head.dense",
        activation="gelu",
        norm="head.norm",
        out="classifier",
        biased=("out",),
        default_dropout=0.0,
    ),
    "qwen3": DECODER,
    "llama": DECODER,
    "mistral": DECODER,
    "gemma3_text": DECODER,
}
OBJECT = ("an object", lambda x: isinstance(x, dict))
PROBABILITY = ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1)
# The fields of config.json that a head depends on.
FIELDS: Schema = {
    **dict.fromkeys(("id2label", "sentence_transformers"), OBJECT),
    **dict.fromkeys(("classifier_dropout", "seq_classif_dropout"), PROBABILITY),
    **dict.fromkeys(("classifier_activation", "classifier_pooling", "sbert_ce_default_activation_function"), TEXT),
    "classifier_bias": BOOL,
    "num_labels": COUNT,
}


class Head(nn.Module):
    """Pooled vectors [P, D] -> scores [P, 1]. `biased`: the modules that have a bias."""

    def __init__(
        self, layout: Layout, features: int, *, activation: str, dropout: float, biased: Mapping[str, bool], eps: float
    ):
        super().__init__()
        self.dense = Linear(features, features, bias=biased["dense"]) if layout.dense else None
        self.norm = nn.LayerNorm(features, eps=eps, bias=biased["norm"]) if layout.norm else None
        self.out = Linear(features, 1, bias=biased["out"])
        self.activation, self.drops_pooled, self.dropout = (
            ACTIVATIONS[activation],
            layout.drops_pooled,
            Dropout(dropout),
        )
        for linear in filter(None, (self.dense, self.out)):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, pooled_PD: Tensor) -> Tensor:
        x_PD = self.dropout(pooled_PD) if self.drops_pooled else pooled_PD
        if self.dense is not None:
            x_PD = self.activation(self.dense(x_PD))
        return self.out(self.dropout(x_PD if self.norm is None else self.norm(x_PD)))


def find_layout(path: Path, model_type: str) -> Layout:
    """Raises `ValueError` naming `path` for a family without a layout."""
    if model_type not in LAYOUTS:
        raise ValueError(f"{path}: model_type is {model_type!r}, expected one with a head: {', '.join(LAYOUTS)}")
    return LAYOUTS[model_type]


def build_head(layout: Layout, config: Any, values: Mapping[str, Any], path: Path) -> tuple[Head, Pooling]:
    """A new head, and the pooling before it. `config`: the encoder's; `values`: the content of `path`, config.json.
    Raises `ValueError` naming a field with an invalid value."""
    check(path, values, FIELDS)
    activation = values.get("classifier_activation", layout.activation)
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"{path}: classifier_activation is {activation[:60]!r}, expected one of {names}")
    biased = {name: name in layout.biased for name in ("dense", "norm", "out")}
    biased |= {"dense": values.get("classifier_bias", biased["dense"]), "norm": getattr(config, "norm_bias", True)}
    default = config.hidden_dropout_prob if layout.default_dropout is None else layout.default_dropout
    options = {"activation": activation, "biased": biased, "eps": getattr(config, "norm_eps", 1e-5)}
    head = Head(layout, config.hidden_size, dropout=values.get(layout.dropout, default), **options)
    with naming(path):
        return head, Pooling((values.get("classifier_pooling", layout.pooling),), config.hidden_size)


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Whether config.json, `values`, is a classifier's, such as a cross-encoder's."""
    return any(name.endswith(CLASSIFIER) for name in _architectures(values))


def classifier_name(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """{"architectures": the class in transformers of the model with a head}, by which servers tell it from an encoder;
    {} if `values`, the content of config.json, name no class."""
    names = [re.sub(r"(Model|For[A-Z]\w*)$", CLASSIFIER, name) for name in _architectures(values)]
    return {"architectures": names} if names else {}


def _architectures(values: Mapping[str, Any]) -> list[str]:
    found = values.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
