"""`fv.data.open`: every format gives exactly what was written."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
import torch

import ferrovae as fv
from data.files import idx_bytes, images, write_folder


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_layout(tmp_path, zipped):
    x, y = write_folder(tmp_path, zipped=zipped)
    dataset = fv.data.open(tmp_path)
    assert (len(dataset), dataset.shape, dataset.dtype, dataset.split) == (20, (1, 5, 4), torch.uint8, "train")
    assert np.array_equal(dataset.data.numpy(), x[:, None])
    assert dataset.labels.dtype == torch.int64
    assert np.array_equal(dataset.labels.numpy(), y)


def test_one_idx_file_with_labels_elsewhere(tmp_path):
    x = images()
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx_bytes(x[:, 0])))
    (tmp_path / "y").write_bytes(idx_bytes(np.arange(20)))
    dataset = fv.data.open(str(tmp_path / "x.gz"), labels=tmp_path / "y")
    assert dataset.shape == (4,)
    assert np.array_equal(dataset[[3, 1]].numpy(), x[[3, 1], 0])
    assert dataset.labels.tolist() == list(range(20))
    assert fv.data.open(tmp_path / "x.gz").labels is None


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", ">f4", "<f8", ">f8", ">f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path, dtype, order):
    x = np.asarray(np.random.default_rng(1).uniform(0, 200, (7, 3, 5, 4)).astype(dtype), order=order)
    np.save(tmp_path / "x.npy", x)
    dataset = fv.data.open(tmp_path / "x.npy")
    assert dataset.shape == (3, 5, 4)
    assert np.array_equal(dataset.data.numpy(), x)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_versions_and_labels(tmp_path, version):
    x = images()
    for name, array in (("train.npy", x), ("train-labels.npy", np.arange(20, dtype=np.int16))):
        with (tmp_path / name).open("wb") as file:
            np.lib.format.write_array(file, array, version=version)
    dataset = fv.data.open(tmp_path)
    assert np.array_equal(dataset.data.numpy(), x[:, None])
    assert dataset.labels.tolist() == list(range(20))


def test_unaligned_npy(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 2), }\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert len(content) % 4
    (tmp_path / "x.npy").write_bytes(content + np.arange(6, dtype="<f4").tobytes())
    assert fv.data.open(tmp_path / "x.npy").data.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_shared(dtype):
    x = torch.arange(24).reshape(4, 2, 3).to(dtype)
    dataset = fv.data.open(x, labels=torch.arange(4, dtype=torch.int32), split="test")
    assert (dataset.shape, dataset.dtype, dataset.split) == ((1, 2, 3), dtype, "test")
    assert dataset.data.data_ptr() == x.data_ptr()
    assert torch.equal(dataset[1], x[1][None])
    assert torch.equal(dataset[1:3], x[1:3, None])
    assert torch.equal(fv.data.open(x.transpose(1, 2)).data, x.transpose(1, 2)[:, None])


def test_arrays_of_any_layout():
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for array in (x, x[::-1], x.astype(">f4"), np.asfortranarray(x), np.broadcast_to(x[:1], (4, 6))):
        assert np.array_equal(fv.data.open(array).data.numpy(), array)
    x.flags.writeable = False
    assert np.array_equal(fv.data.open(x).data.numpy(), x)
    assert fv.data.open(np.arange(5, dtype=np.float32)).shape == ()


def test_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = fv.data.open("digits"), fv.data.open("digits", split="test")
    assert (len(train), len(test), train.shape, train.dtype) == (1437, 360, (1, 8, 8), torch.uint8)
    both = np.concatenate([train.data.numpy(), test.data.numpy()])[:, 0]
    assert np.array_equal(both, np.round(digits.images * 255 / 16))
    assert np.array_equal(np.concatenate([train.labels, test.labels]), digits.target)
    assert train.fingerprint != test.fingerprint


def test_subset():
    dataset = fv.data.open(images(), labels=torch.arange(20))
    part = dataset.subset(5, 15, split="validation")
    assert (len(part), part.shape, part.split) == (10, (1, 5, 4), "validation")
    assert part.data.data_ptr() == dataset.data[5].data_ptr()
    assert part.labels.tolist() == list(range(5, 15))
    with pytest.raises(ValueError, match="10:25"):
        dataset.subset(10, 25)


def test_fingerprint_sees_every_difference():
    x = images()
    changed = x.copy()
    changed[19, 4, 3] ^= 1
    variants = [(x, None), (changed, None), (x.reshape(20, 20), None), (x[:19], None), (x, torch.arange(20))]
    prints = [fv.data.open(data, labels=labels).fingerprint for data, labels in variants]
    assert len(set(prints)) == len(prints)
    assert prints[0] == fv.data.open(x.copy()).fingerprint


def test_large_fingerprints_are_sampled(monkeypatch):
    from ferrovae.data import dataset as module

    monkeypatch.setattr(module, "_FULL_HASH", 4096)
    monkeypatch.setattr(module, "_BLOCK", 512)
    x = torch.zeros(100, 100, dtype=torch.uint8)
    first = fv.data.open(x).fingerprint
    for place in ((0, 0), (99, 99)):
        changed = x.clone()
        changed[place] = 1
        assert fv.data.open(changed).fingerprint != first


def test_mnist(mnist):
    train, test = fv.data.open(mnist), fv.data.open(mnist, split="test")
    assert (len(train), len(test), train.shape) == (60_000, 10_000, (1, 28, 28))
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (60_000, 28, 28))
    digest = hashlib.sha256(header + train.data.numpy().tobytes()).hexdigest()
    assert digest == "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
