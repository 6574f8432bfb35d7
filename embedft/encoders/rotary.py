"""Rotary position embeddings: queries and keys are turned by angles that grow with a token's position.

    turns = angles(packed.positions, width=64, settings=rope_settings(config), dtype=q_THK.dtype)
    q_THK, k_TGK = rotate(q_THK, turns), rotate(k_TGK, turns)

Source: Su et al. 2021 (RoFormer), section 3.4.2, with the pairs (i, i + K / 2) instead of (2 i, 2 i + 1), as in
checkpoints.

Shapes: T tokens, H heads, K width of a head, R = K / 2 pairs.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# {type in config.json: the numbers it needs}; "default" extends nothing.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def rope_settings(config: Any, *, theta: float = 10_000.0, layer_type: str | None = None) -> dict[str, Any]:
    """What config.json says of rotary embeddings: `rope_parameters` of transformers 5, by layer type if it has several,
    or `rope_theta` and `rope_scaling` of versions before. Raises `ValueError` naming what is unknown or missing."""
    given = config.rope_parameters or {}
    given = given.get(layer_type, given) if layer_type else given
    settings = {"rope_theta": getattr(config, "rope_theta", None) or theta, "rope_type": "default"}
    settings |= {**(getattr(config, "rope_scaling", None) or {}), **given}
    kind = settings["rope_type"] = settings.get("type", settings["rope_type"])
    if kind not in SCALINGS:
        raise ValueError(f"rope_type is {repr(kind)[:60]}, expected one of {', '.join(SCALINGS)}")
    for name in ("rope_theta", *SCALINGS[kind]):
        value = settings.get(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} of {kind} rotary embeddings is {repr(value)[:60]}, expected a number above 0")
    return settings


def angles(
    positions_T: Tensor, *, width: int, settings: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of all tokens, [T, 1, R] each, computed in float32."""
    inverse_R, scale = frequencies(width, settings, positions_T.device)
    angle_T1R = positions_T.float()[:, None, None] * inverse_R
    return (angle_T1R.cos() * scale).to(dtype), (angle_T1R.sin() * scale).to(dtype)


def rotate(x_THK: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair of features turned by its token's angle."""
    cos_T1R, sin_T1R = turns
    first_THR, second_THR = x_THK.chunk(2, dim=-1)
    return torch.cat([first_THR * cos_T1R - second_THR * sin_T1R, second_THR * cos_T1R + first_THR * sin_T1R], dim=-1)


def frequencies(width: int, settings: Mapping[str, Any], device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair, [R] float32, and a factor for the cosines and sines.

    Source of "linear": Chen et al. 2023 (Position interpolation), section 3.2; of "yarn": Peng et al. 2023 (YaRN),
    section 3.4; of "llama3": the Llama 3.1 reference code, `apply_scaling`."""
    pairs_R = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    period_R = settings["rope_theta"] ** (pairs_R / width)
    inverse_R, kind = 1.0 / period_R, settings["rope_type"]
    if kind == "default":
        return inverse_R, 1.0
    factor = settings["factor"]
    if kind == "linear":
        return inverse_R / factor, 1.0
    if kind == "llama3":
        low, high, length = (settings[name] for name in SCALINGS[kind][1:])
        # 0 for waves longer than length / low, which are stretched; 1 for those shorter than length / high, which stay.
        kept_R = ((length * inverse_R / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return (1 - kept_R) * inverse_R / factor + kept_R * inverse_R, 1.0
    scale = settings.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    length, theta = settings["original_max_position_embeddings"], settings["rope_theta"]

    def pair_turning(times: float) -> float:
        """The pair, as a real number, that turns so many times within the original length."""
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (pair_turning(settings.get(name, default)) for name, default in (("beta_fast", 32), ("beta_slow", 1)))
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretched_R = ((torch.arange(width // 2, device=device).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretched_R / (factor * period_R) + (1 - stretched_R) / period_R, scale
