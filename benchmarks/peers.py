"""sentence-transformers as users run it, by the name that --peer gives.

model = load_peer("sentence-transformers-bf16", folder, device="cpu", dtype="float32", max_length=512)
model.encode(texts)
"""

import importlib.metadata
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

# The smallest cosine to our vectors that is accepted; 1: their values must be equal.
LEAST_COSINE = {
    "sentence-transformers": 1.0,
    "sentence-transformers-bf16": 0.999,
    "sentence-transformers-compile": 1.0,  # in our precision
    "sentence-transformers-flash": 0.999,  # bfloat16, without padding; needs flash-attn
    "sentence-transformers-onnx-int8": 0.9,
    "sentence-transformers-openvino-int8": 0.9,
}
NUM_CALIBRATION = 300  # as many as its own export draws


def version() -> str:
    return importlib.metadata.version("sentence-transformers")


def load_peer(
    peer: str, folder: str, *, device: str, dtype: str = "float32", max_length: int, texts: Sequence[str] = ()
) -> Any:
    """A SentenceTransformer. `dtype`: of the compiled one, where half; `texts`: what OpenVINO calibrates int8 with.
    Raises `ImportError` if a backend is not installed."""
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
        half = "bfloat16" if variant in ("bf16", "flash") else dtype if variant == "compile" else "float32"
        settings = {"dtype": getattr(torch, half if half != "int8" else "float32")}
        settings |= {"attn_implementation": "flash_attention_2"} if variant == "flash" else {}
        model = SentenceTransformer(folder, device=device, model_kwargs=settings)
    model.max_seq_length = max_length
    if variant == "compile":
        model.compile(dynamic=True)
    return model


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
