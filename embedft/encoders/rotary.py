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
    "ntk": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
SMALLEST, LARGEST = 1e-18, 1e18  # integers below fit in 64 bits; quotients of numbers between stay finite
OPTIONS = {"yarn": ("attention_factor", "beta_fast", "beta_slow")}  # the numbers that may be there or not


def rope_settings(config: Any, *, theta: float = 10_000.0, layer_type: str | None = None) -> dict[str, Any]:
    """What config.json says of rotary embeddings: `rope_parameters` of transformers 5, by layer type if it has several,
    or `rope_theta` and `rope_scaling` of versions before. Raises `ValueError` naming what is unknown or missing."""
    given = config.rope_parameters or {}
    if layer_type is not None:
        is_by_type = any(isinstance(value, dict) for value in given.values())
        given = given.get(layer_type, None if is_by_type else given)
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters of {layer_type} is {repr(given)[:60]}, expected an object")
    settings = {"rope_theta": getattr(config, "rope_theta", None) or theta}
    settings |= {**(getattr(config, "rope_scaling", None) or {}), **given}
    kind = settings["rope_type"] = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ValueError(f"rope_type is {repr(kind)[:60]}, expected one of {', '.join(SCALINGS)}")
    if kind == "ntk" and settings.get("mixed_b") is not None:
        raise ValueError(f"mixed_b of ntk rotary embeddings is {repr(settings['mixed_b'])[:60]}, expected null")
    for name in ("rope_theta", *SCALINGS[kind], *(x for x in OPTIONS.get(kind, ()) if settings.get(x) is not None)):
        value, least = settings.get(name), 1 if name == "rope_theta" else SMALLEST
        if type(value) not in (int, float) or not least < value < LARGEST:
            expected = f"a number above {least:g} and below {LARGEST:g}"
            raise ValueError(f"{name} of {kind} rotary embeddings is {repr(value)[:60]}, expected {expected}")
    if kind == "llama3" and settings["low_freq_factor"] >= (high := settings["high_freq_factor"]):
        low = settings["low_freq_factor"]
        raise ValueError(f"low_freq_factor of llama3 is {low}, expected less than high_freq_factor, which is {high}")
    return settings


def check_heads(config: Any) -> None:
    """Raises `ValueError` if the features of a head are not pairs."""
    if (D := config.hidden_size) % (2 * (H := config.num_attention_heads)):
        raise ValueError(f"hidden_size is {D}, expected an even multiple of num_attention_heads, which is {H}")


def angles(
    positions_T: Tensor, *, width: int, settings: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of all tokens, [T, 1, R] each, computed in float32."""
    inverse_R, scale = frequencies(width, settings, positions_T.device)
    angle_T1R = positions_T.float()[:, None, None] * inverse_R
    return (angle_T1R.cos() * scale).to(dtype), (angle_T1R.sin() * scale).to(dtype)


def rotate(x_THK: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Each pair of features turned by its token's angle; in the dtype of `x_THK`, which autocast may have halved."""
    cos_T1R, sin_T1R = turns
    first_THR, second_THR = x_THK.chunk(2, dim=-1)
    turned = first_THR * cos_T1R - second_THR * sin_T1R, second_THR * cos_T1R + first_THR * sin_T1R
    return torch.cat(turned, dim=-1).to(x_THK.dtype)


def frequencies(width: int, settings: Mapping[str, Any], device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair, [R] float32, and a factor for the cosines and sines.

    Source of "linear": Chen et al. 2023 (Position interpolation), section 3.2; of "ntk": Su 2023,
    kexue.fm/archives/9706, equation 6; of "yarn": Peng et al. 2023 (YaRN), section 3.4; of "llama3": the Llama 3.1
    reference code, `apply_scaling`."""
    pairs_R = torch.arange(0, width, 2, dtype=torch.int64, device=device).float()
    period_R = settings["rope_theta"] ** (pairs_R / width)
    inverse_R, kind = 1.0 / period_R, settings["rope_type"]
    if kind == "default":
        return inverse_R, 1.0
    factor = settings["factor"]
    if kind == "linear":
        return inverse_R / factor, 1.0
    if kind == "ntk":  # pair i is slowed down by factor^(2 (i + 1) / K): the last one by the whole factor
        return inverse_R / factor ** ((pairs_R + 2) / width), 1.0
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
