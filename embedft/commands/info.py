"""`embedft info`: describes a model.

embedft info sentence-transformers/all-MiniLM-L6-v2
"""

from dataclasses import dataclass

from ..config import option
from .options import DTYPE, Dtype, Model, load_model


@dataclass(frozen=True, kw_only=True)
class Options(Model):
    dtype: Dtype = option("float32", DTYPE)


def run(options: Options) -> None:
    """Prints one line per fact."""
    from ..encoders.card import facts

    embedder = load_model(options, dtype=options.dtype)
    if hasattr(embedder, "endpoint"):
        limit = embedder.endpoint.max_tokens
        print(f"{embedder.model} at {embedder.endpoint.server.name}: known only by name;")
        print(f"it reads {f'up to {limit:,} tokens' if limit else 'as many tokens as its server allows'}")
        return
    for name, value in {**facts(embedder), "device": embedder.device}.items():
        print(f"{name:<14} {value}")
