"""pickles.py: pytorch_model.bin is read on request, as tensors alone; nothing in it is run."""

import functools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from naming import names, naming
from safetensors.torch import load_file

from embedft import load_embedder, load_scorer, new_scorer
from embedft.cli import main
from embedft.files import read_json, write_json

TEXTS = ["", "the fee", "order of the hello world"]
load = functools.partial(load_embedder, device="cpu")


@pytest.fixture
def plain(write_tiny, tmp_path) -> Path:
    """Transformer, Pooling and Dense, with safetensors."""
    folder = write_tiny(tmp_path / "plain", modules=True, normalize=False)
    write_json(folder / "2_Dense" / "config.json", {"in_features": 32, "out_features": 8})
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    entry = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    write_json(folder / "modules.json", [*read_json(folder / "modules.json"), entry])
    return folder


@pytest.fixture
def pickled(plain, tmp_path) -> Path:
    """The same with pytorch_model.bin alone."""
    folder = shutil.copytree(plain, tmp_path / "pickled")
    for file in list(folder.rglob("model.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return folder


def refused(folder: Path, *facts, **options) -> None:
    with pytest.raises(ValueError, match=naming(*facts)) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_pickles_are_read_on_request_alone(plain, pickled, tmp_path):
    refused(pickled, pickled, "model.safetensors", "pytorch_model.bin", "pytorch_model.bin", "allow_pickle")
    embedder = load(pickled, allow_pickle=True)
    assert np.array_equal(embedder.encode(TEXTS), load(plain).encode(TEXTS))
    assert embedder.sha256() == load(plain).sha256()
    embedder.save(tmp_path / "saved")
    assert load(tmp_path / "saved").sha256() == embedder.sha256()
    assert not list((tmp_path / "saved").rglob("*.bin"))


def test_a_pickle_of_a_part_is_refused_too(plain, pickled):
    shutil.copy(plain / "model.safetensors", pickled)
    refused(pickled, pickled / "2_Dense", "model.safetensors", "pytorch_model.bin", "pytorch_model.bin")
    assert load(pickled, allow_pickle=True).dim == 8


def test_safetensors_come_first(plain):
    (plain / "pytorch_model.bin").write_bytes(b"not read")
    assert load(plain, allow_pickle=True).sha256() == load(plain).sha256()


def test_a_pickle_of_before_torch_1_6(plain, pickled):
    path = pickled / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert load(pickled, allow_pickle=True).sha256() == load(plain).sha256()


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(pickled, tmp_path, zipped):
    path, trace = pickled / "pytorch_model.bin", tmp_path / "trace"
    torch.save({"weight": torch.zeros(1), "bomb": Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
    refused(pickled, path, "tensors", allow_pickle=True)
    path.write_bytes(pickle.dumps(Bomb(trace)))
    refused(pickled, path, "tensors", allow_pickle=True)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state": {"weight": torch.zeros(1)}}, torch.zeros(2), {"a": 1}])
def test_other_things_than_named_tensors(pickled, content):
    torch.save(content, pickled / "pytorch_model.bin")
    refused(pickled, pickled / "pytorch_model.bin", "tensors", allow_pickle=True)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda x: x.to("meta"), lambda x: x[:1].expand(10**10, 32)],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_that_are_less_than_they_say(pickled, change):
    """The last one takes 128 bytes in the file and 1.2 TB in memory."""
    tensors = torch.load(pickled / "pytorch_model.bin")
    name = next(name for name in tensors if "word_embeddings" in name)
    torch.save(tensors | {name: change(tensors[name])}, pickled / "pytorch_model.bin")
    refused(pickled, pickled / "pytorch_model.bin", repr(name), "tensor", allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"PK\x03\x04", b"\x00" * 100])
def test_damaged_pickles(pickled, content):
    (pickled / "pytorch_model.bin").write_bytes(content)
    refused(pickled, pickled / "pytorch_model.bin", "tensors", allow_pickle=True)


def test_a_cut_pickle(pickled):
    path = pickled / "pytorch_model.bin"
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 7):
        path.write_bytes(whole[:length])
        refused(pickled, path, "tensors", allow_pickle=True)


def test_a_pointer_in_place_of_a_pickle(pickled):
    (pickled / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(pickled, pickled / "pytorch_model.bin", "git lfs pull", allow_pickle=True)


def test_a_cross_encoder(pickled, plain, tmp_path):
    folder = tmp_path / "scorer"
    new_scorer(load(plain)).save(folder)
    expected = load_scorer(folder, device="cpu").score([("the fee", "order of the world")])
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=naming(folder, "pytorch_model.bin", "allow_pickle")):
        load_scorer(folder)
    scorer = load_scorer(folder, device="cpu", allow_pickle=True)
    assert np.array_equal(scorer.score([("the fee", "order of the world")]), expected)


def test_from_the_command_line(pickled, capsys):
    assert main(["info", str(pickled)]) == 2
    error = capsys.readouterr().err
    assert names(error, "pytorch_model.bin", "--allow-pickle")
    assert error.count("--allow-pickle") == 1
    assert main(["info", str(pickled), "--allow-pickle"]) in (None, 0)
    assert "dimensions     8" in capsys.readouterr().out
