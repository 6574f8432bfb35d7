"""The settings of a grid: those of `embedft finetune` that change results, how cells are evaluated, and adapters.

options, evaluation, adapter = settings_of({"model": "...", "data": ["train.csv"], "evaluate": {"dim": 32}})
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from ..commands.finetune import Options
from ..commands.options import Bm25
from ..config import check_at_most_one, check_types, from_dict, option, suggestion
from ..losses.registry import LOSSES, Loss, loss_options
from ..training.configs import AdapterConfig, FinetuneConfig

# Options of `embedft finetune` that a runner decides, not a grid.
OF_THE_RUNNER = ("out", "overwrite", "resume", "store", "device", "config", "quiet", "log")
MODEL = ("model", "revision", "num_layers", "query_prompt", "document_prompt", "allow_pickle")
DATA = ("data", "validation", "validation_split", "format", "split", "skip_empty", "strict", "merge")
PARTS = ("evaluate", "adapter")  # settings beside those of `embedft finetune`, each with keys of its own
OF_ADAPTERS = (*MODEL, *DATA, *PARTS, "max_length", "passages")  # what changes a cell with an adapter


@dataclass(frozen=True)
class Evaluation(Bm25):
    """How the tests and the validation questions are searched."""

    passages: list[int] | Literal["training"] | None = option("training", "windows [those of training]")
    dim: int | None = option(None, "leading dimensions to keep [all]", least=1)
    pca: int | None = option(None, "principal components of the training documents to map onto [none]", least=1)
    precision: Literal["float32", "int8", "binary"] = option("float32", "type of document vectors")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = option("float32", "type of the model's weights")
    fuse_weight: float | None = option(None, "fuse: X for BM25, 1 - X for the model [the model alone]", least=0, most=1)

    def __post_init__(self):
        check_types(type(self), vars(self))
        check_at_most_one(self, "dim", "pca")


def complete(base: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a grid's base. Raises `ValueError` for unknown ones, and those of the runner or the seeds."""
    for key in base:
        check_key(key)
    options, evaluation, _ = settings_of(base)
    found = {name: value for name, value in asdict(options).items() if name not in (*OF_THE_RUNNER, "seed")}
    return found | {"evaluate": asdict(evaluation), "adapter": dict(base.get("adapter", {}))}


def settings_of(config: Mapping[str, Any]) -> tuple[Options, Evaluation, AdapterConfig | None]:
    """A configuration as the options of `embedft finetune`, the way of evaluating and, if there is one, the adapter."""
    plain, parts = dict(config), {name: config.get(name, {}) for name in PARTS}
    for name, given in parts.items():
        plain.pop(name, None)
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r}, expected KEY=VALUE or {{...}}")
    options = from_dict(Options, {**plain, "out": ""})
    evaluation = from_dict(Evaluation, parts["evaluate"], "evaluate: ")
    if not parts["adapter"]:
        return options, evaluation, None
    if "seed" in parts["adapter"]:
        raise ValueError("adapter: seed is not a setting of a grid: use seeds")
    if evaluation.pca:
        raise ValueError(
            f"adapter cannot be combined with pca, which is {evaluation.pca}: both map the model's vectors"
        )
    return options, evaluation, from_dict(AdapterConfig, {**parts["adapter"], "seed": options.seed}, "adapter: ")


def check_key(key: str) -> None:
    """Raises `ValueError` unless a dotted key begins with a setting of a grid."""
    first = key.partition(".")[0]
    known = [each.name for each in fields(Options) if each.name not in (*OF_THE_RUNNER, "seed")] + [*PARTS]
    if first == "seed":
        raise ValueError("seed is not a setting of a grid: use seeds")
    if first in OF_THE_RUNNER:
        raise ValueError(f"{first} changes no result, so it is not a setting of a grid")
    if first not in known:
        raise ValueError(f"unknown key {key!r}{suggestion(first, known)}; expected one of {', '.join(known)}")


def complete_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Loss, LoRA and adapter with the defaults of their options."""
    lora, (*_, adapter) = from_dict(FinetuneConfig, {"lora": config["lora"]}).lora_config(), settings_of(config)
    found = {"loss": _complete_loss(config["loss"]), "lora": asdict(lora) if lora else {}, "adapter": {}}
    if adapter is not None:
        found["adapter"] = asdict(adapter) | {"loss": _complete_loss(adapter.loss)}
        del found["adapter"]["seed"]
    return found


def _complete_loss(spec: Any) -> Any:
    if not isinstance(spec, Mapping) or spec.get("name") not in LOSSES:
        return spec
    found = {"name": spec["name"]}
    for name, parameter in loss_options(LOSSES[spec["name"]]).items():
        value = spec.get(name, parameter.default)
        parts = value if isinstance(value, list | tuple) else [value]
        if parameter.annotation in (Loss, Sequence[Loss]):
            parts = list(map(_complete_loss, parts))
        found[name] = list(parts) if isinstance(value, list | tuple) else parts[0]
    return found
