"""sentence-transformers as users run it, by the name that --peer gives, in inference and in training.

model = load_peer("sentence-transformers-bf16", folder, device="cpu", dtype="float32", max_length=512)
model.encode(texts)
"""

import importlib.metadata
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Peer(NamedTuple):
    least_cosine: float  # to our vectors that is accepted; 1: their values must be equal
    dtype: str | None  # what it computes in; None: as we do
    trains: bool = True


PEERS = {
    "sentence-transformers": Peer(1.0, "float32"),
    "sentence-transformers-bf16": Peer(0.999, "bfloat16"),
    "sentence-transformers-compile": Peer(1.0, None),  # needs a C++ compiler on the CPU, triton on CUDA
    "sentence-transformers-flash": Peer(0.999, "bfloat16"),  # without padding; needs flash-attn
    "sentence-transformers-onnx-int8": Peer(0.9, "int8", trains=False),
    "sentence-transformers-openvino-int8": Peer(0.9, "int8", trains=False),
}
TRAINING = [name for name, peer in PEERS.items() if peer.trains]
NUM_CALIBRATION = 300  # as many as its own export draws


def version() -> str:
    return importlib.metadata.version("sentence-transformers")


def dtype_of(peer: str, ours: str) -> str:
    """What a peer computes in beside `ours`; it has no int8 but that of its backends."""
    return PEERS[peer].dtype or ("float32" if ours == "int8" else ours)


def load_peer(
    peer: str,
    folder: str,
    *,
    device: str,
    dtype: str = "float32",
    max_length: int | None = None,
    texts: Sequence[str] = (),
    training: bool = False,
) -> Any:
    """A SentenceTransformer. Raises `ImportError` if a backend is not installed.

    Args:
        dtype: ours; texts: what OpenVINO calibrates int8 with.
        training: with float32 weights, for autocast, and its encoder compiled, not the whole: losses replace its parts.
    """
    from sentence_transformers import SentenceTransformer

    variant = peer.removeprefix("sentence-transformers").removeprefix("-")
    if variant in ("onnx-int8", "openvino-int8"):
        try:
            model = _onnx_int8(folder) if variant == "onnx-int8" else _openvino_int8(folder, texts)
        except Exception as error:
            if type(error) is Exception:  # how it says that a backend is missing
                raise ImportError(str(error)) from None
            raise
    else:
        settings = {"dtype": torch.float32 if training else getattr(torch, dtype_of(peer, dtype))}
        settings |= {"attn_implementation": "flash_attention_2"} if variant == "flash" else {}
        model = SentenceTransformer(folder, device=device, model_kwargs=settings)
    if max_length is not None:
        model.max_seq_length = max_length
    if variant == "compile":
        _require_compiler(device)
        (model.transformers_model if training else model).compile(dynamic=True)
    return model


def _require_compiler(device: str) -> None:
    """Raises `ImportError` if torch.compile works on nothing."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except TorchDynamoException as error:
        raise ImportError(str(error).partition("\n")[0]) from None


def _onnx_int8(folder: str) -> Any:
    """Its ONNX backend, dynamically quantized as it recommends for AVX-512 with VNNI."""
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    with tempfile.TemporaryDirectory() as place:
        model = SentenceTransformer(folder, device="cpu", backend="onnx", model_kwargs={"export": True})
        model.save_pretrained(place)
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", place)
        file = {"file_name": "onnx/model_qint8_avx512_vnni.onnx"}
        return SentenceTransformer(place, device="cpu", backend="onnx", model_kwargs=file)


def _openvino_int8(folder: str, texts: Sequence[str]) -> Any:
    """Its OpenVINO backend, statically quantized as by its own export, but calibrated on `texts`."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", backend="openvino", model_kwargs={"export": True})
    import nncf  # comes with optimum-intel

    encoder = model.transformers_model
    samples = [dict(model.preprocess([text])) for text in texts[:NUM_CALIBRATION]]
    names = {name for tensor in encoder.model.inputs for name in tensor.get_names()}
    samples = [{name: value.numpy() for name, value in sample.items() if name in names} for sample in samples]
    encoder.model = nncf.quantize(encoder.model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    encoder.request = None  # compiled again, from the new model
    encoder.compile()
    return model
