"""`embedft info`: describes a model.

embedft info sentence-transformers/all-MiniLM-L6-v2
"""

from .options import Model as Options
from .options import load_model


def run(options: Options) -> None:
    """Prints one line per fact."""
    embedder = load_model(options)
    if hasattr(embedder, "endpoint"):
        limit = embedder.endpoint.max_tokens
        print(f"{embedder.model} at {embedder.endpoint.server.name}: known only by name;")
        print(f"it reads {f'up to {limit:,} tokens' if limit else 'as many tokens as its server allows'}")
        return
    pooling = embedder.pooling
    used = {role: embedder.prompt(role) for role in ("query", "document") if embedder.prompt(role)}
    rows = {
        "folder": embedder.source.folder,
        "family": embedder.source.config["model_type"],
        "parameters": f"{sum(p.numel() for p in embedder.parameters()):,}",
        "layers": getattr(embedder.encoder.config, "num_hidden_layers", 0),
        "dimensions": embedder.dim,
        "max_length": f"{embedder.max_length} tokens (the encoder has {embedder.encoder.config.max_length} positions)",
        "pooling": " + ".join(pooling.names) + ("" if pooling.include_prompt else ", without the prompt"),
        "similarity": embedder.similarity,
        "prompts": ", ".join(f"{role}: {text!r}" for role, text in used.items()) or "none",
        "other prompts": ", ".join(f"{n}: {text!r}" for n, text in embedder.prompts.items() if n not in used and text),
        "carried along": ", ".join(embedder.source.carried) or "nothing",
        "device": embedder.device,
    }
    for name, value in rows.items():
        if value != "":
            print(f"{name:<14} {value}")
