"""What a model is, on one screen, and its model card: the README.md of its folder.

    facts(embedder)         # {"family": "bert", "parameters": "22,565,376: ...", ...}
    write_card(Path("model"), embedder, training={"base": "..."}, results="| metric | ...")

Shapes: L tokens of a text, K width of a head.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ..files import atomic_write, read_text
from .adapter import ROLES
from .dtypes import described_dtype
from .folder import family_of
from .int8 import Int8Linear

CARD_FILE = "README.md"
MARK = "<!-- Written by embedft; it replaces this file as long as this line is here. -->"

EMBEDDER = [
    "```python",
    "from embedft import load_embedder",
    "",
    'embedder = load_embedder("this folder")',
    'queries = embedder.encode(["a question"], role="query")',
    'documents = embedder.encode(["a document"], role="document")',
    "```",
    "",
]
SCORER = [
    "```python",
    "from embedft import load_scorer",
    "",
    'scorer = load_scorer("this folder")',
    'scores = scorer.score([("a question", "a document")])',
    "```",
    "",
]
CROSS_ENCODER = [
    "```python",
    "from sentence_transformers import CrossEncoder",
    "",
    'model = CrossEncoder("this folder")',
    'scores = model.predict([("a question", "a document")])',
    "```",
    "",
]
SENTENCE_TRANSFORMERS = [
    "```python",
    "from sentence_transformers import SentenceTransformer",
    "",
    'model = SentenceTransformer("this folder")',
    'queries = model.encode_query(["a question"])',
    'documents = model.encode_document(["a document"])',
    "```",
    "",
]


def facts(model: nn.Module) -> dict[str, str]:
    """What an `Embedder` or a `Scorer` is, one line per fact; those that do not apply are left out."""
    encoder, source = model.encoder, model.source
    parts = Counter()
    for name, parameter in model.named_parameters():
        parts[name.removeprefix("encoder.").partition(".")[0]] += parameter.numel()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    linear, attention = flops(encoder)
    work = f"{linear / 1e6:,.1f} million per token + {attention:,} per token for each token it attends to"
    found = {
        "folder": str(source.folder) if source else "",
        "family": source.config["model_type"] if source else type(encoder).__qualname__,
        "parameters": f"{sum(parts.values()):,}: " + ", ".join(f"{name} {count:,}" for name, count in parts.items()),
        "layers": str(getattr(encoder.config, "num_hidden_layers", 0)),
        "memory": f"{size / 2**20:,.0f} MiB of weights in {described_dtype(model)}",
        "FLOPs": work if linear else "",
        **(_facts_of_scores(model) if is_scorer(model) else _facts_of_vectors(model)),
        "carried along": ", ".join(source.carried) if source else "",
        "fingerprint": model.sha256()[:16],
    }
    return {name: value for name, value in found.items() if value}


def is_scorer(model: nn.Module) -> bool:
    """Whether a model gives scores of pairs, not vectors of texts."""
    return hasattr(model, "score")


def _facts_of_scores(scorer: nn.Module) -> dict[str, str]:
    return {
        "max_length": _length(scorer),
        "pooling": " + ".join(scorer.pooling.names),
        "scores": "0 to 1" if scorer.sigmoid else "logits",
    }


def _facts_of_vectors(embedder: nn.Module) -> dict[str, str]:
    pooling, lora = embedder.pooling, embedder.lora.config if embedder.lora else None
    used = {role: embedder.prompt(role) for role in ROLES if embedder.prompt(role)}
    others = {name: text for name, text in embedder.prompts.items() if text and text not in used.values()}
    heads = {role: embedder.side(role).heads[role] for role in ROLES}
    shown = {role: " + ".join(type(part).__name__ for part in head) for role, head in heads.items()}
    head = ", ".join(f"{role}: {text or 'nothing'}" for role, text in shown.items()) if any(shown.values()) else ""
    return {
        "dimensions": f"{embedder.dim}" + f" of {embedder.full_dim}" * (embedder.dim != embedder.full_dim),
        "max_length": _length(embedder),
        "pooling": " + ".join(pooling.names) + ("" if pooling.include_prompt else ", without the prompt"),
        "head": head if heads["query"] is not heads["document"] else shown["document"],
        "query side": type(embedder.query_side.encoder).__module__.rpartition(".")[-1] if embedder.query_side else "",
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, side {lora.side}" if lora else "",
        "similarity": embedder.similarity,
        "prompts": ", ".join(f"{role}: {text!r}" for role, text in used.items()) or "none",
        "other prompts": ", ".join(f"{name}: {text!r}" for name, text in others.items()),
    }


def _length(model: nn.Module) -> str:
    return f"{model.max_length:,} tokens (the encoder takes {model.encoder.config.max_length:,})"


def flops(encoder: nn.Module) -> tuple[int, int]:
    """Floating-point operations of a forward pass: (a token, in matrix products with weights; a token for each token
    that it attends to). A product and a sum count as two; norms, activations and softmax are left out.

    A text of L tokens without windows takes L * first + L^2 * second."""
    layers = [module for module in encoder.modules() if isinstance(module, nn.Linear | Int8Linear)]
    linear = 2 * sum(layer.weight.numel() for layer in layers)
    config = encoder.config
    layers, heads = (getattr(config, name, 0) for name in ("num_hidden_layers", "num_attention_heads"))
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return linear, 4 * layers * width  # Q K^T and its product with V


def model_card(model: nn.Module, *, training: Mapping[str, str], results: str = "") -> str:
    """Markdown: how to load the model, what it is, and how it was trained and measured, if it was."""
    name = training.get("base", model.source.name if model.source else "")
    scores, lora = is_scorer(model), model.lora
    # Others would update the vectors of both sides, or do not know the class of the encoder.
    is_ours = family_of(model.encoder) is None or (lora is not None and lora.config.side != "both")
    tags = ["sentence-transformers"] * (not is_ours) + ["cross-encoder" if scores else "feature-extraction", "embedft"]
    task = "text-ranking" if scores else "sentence-similarity"
    lines = ["---", f"library_name: {tags[0] if not is_ours else tags[-1]}", f"pipeline_tag: {task}"]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    lines += [f"base_model: {name}"] if name.count("/") == 1 and not Path(name).exists() else []
    ours, theirs = (SCORER, CROSS_ENCODER) if scores else (EMBEDDER, SENTENCE_TRANSFORMERS)
    lines += ["---", MARK, "", f"# A {'cross-encoder' if scores else 'text-embedding model'}", "", *ours]
    lines += [] if is_ours else theirs
    lines += ["## Model", "", *_table({key: value for key, value in facts(model).items() if key != "folder"})]
    lines += ["", "## Training", "", *_table(training)] if training else []
    return "\n".join(lines) + "\n" + (_results(results) if results else "")


def add_results(folder: Path, results: str) -> None:
    """Adds results to a model card that has none, unless someone else wrote it."""
    path = folder / CARD_FILE
    if path.is_file() and MARK in (text := read_text(path)):
        with atomic_write(path) as file:
            file.write(text + _results(results))


def _results(text: str) -> str:
    return f"\n## Results\n\n{text}\n"


def write_card(
    folder: Path,
    model: nn.Module,
    *,
    training: Mapping[str, str] | None = None,
    results: str = "",
    instead_of: Path | None = None,
) -> None:
    """Writes the model card, unless the folder, or the one that it will replace, has a README.md that someone wrote."""
    path = (instead_of or folder) / CARD_FILE
    if not path.is_file() or MARK in read_text(path):
        with atomic_write(folder / CARD_FILE) as file:
            file.write(model_card(model, training=training or {}, results=results))


def _table(rows: Mapping[str, str]) -> list[str]:
    cells = ((name, str(value).replace("|", r"\|").replace("\n", " ")) for name, value in rows.items())
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)]
