"""Bad files are one `DataError` that names the file and what was found and expected; misuse is a `ValueError`."""

from __future__ import annotations

import gzip
import re
import struct

import numpy as np
import pytest
import torch

import ferrovae as fv
from data.files import idx_bytes, images, write_folder
from ferrovae.data import DataError

GOOD = idx_bytes(images())
BAD_FILES = {
    "truncated": (GOOD[:-1], "truncated: 415 bytes, expected 416"),
    "truncated-header": (GOOD[:9], "truncated: ends after 9 bytes, expected 12"),
    "too-long": (GOOD + b"\0", "too long: 417 bytes, expected 416"),
    "wrong-magic": (b"\0\0\x0d\x03" + GOOD[4:], "0x00000d03, expected 0x00000802 to 0x00000804"),
    "labels-for-images": (idx_bytes(np.arange(5)), "0x00000801, expected"),
    "text": (b"<html>not found</html>", "magic number is 0x3c68746d"),
    "empty": (b"", "is empty"),
    "no-examples": (idx_bytes(np.zeros((0, 28, 28))), "0 x 28 x 28 elements, expected at least one"),
    "dims-disagree": (GOOD[:4] + struct.pack(">I", 21) + GOOD[8:], "truncated: 416 bytes, expected 436"),
    "overflow": (b"\0\0\x08\x04" + b"\xff" * 16, "more than memory can address"),
    "gzip-truncated": (gzip.compress(GOOD)[:-9], "truncated"),
    "gzip-no-trailer": (gzip.compress(GOOD)[:-2], "truncated: the gzip stream"),
    "gzip-bad-crc": (gzip.compress(GOOD)[:-8] + b"\0" * 4 + gzip.compress(GOOD)[-4:], "corrupt gzip stream"),
    "gzip-short-content": (gzip.compress(GOOD[:-5]), "truncated: ends after 411 bytes unpacked, expected 416"),
    "gzip-long-content": (gzip.compress(GOOD + b"\0"), "unpacks to more than the 416 bytes expected"),
    "gzip-garbage-after": (gzip.compress(GOOD) + b"garbage", "gzip"),
    "gzip-bomb": (gzip.compress(GOOD + bytes(50_000_000)), "unpacks to more than the 416 bytes expected"),
    "gzip-claims-much": (gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 2**20, 2**10, 2**10)), "can hold"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_idx(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / f"{name}-file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        fv.data.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def npy(array) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


NPY = npy(np.zeros((4, 3), np.float32))
BAD_NPY = {
    "truncated": (NPY[:-1], "truncated: 175 bytes, expected 176"),
    "too-long": (NPY + b"\0", "too long: 177 bytes, expected 176"),
    "wrong-magic": (GOOD, "NUMPY"),
    "empty": (b"", "is empty"),
    "objects": (npy(np.array([{}, None], dtype=object)), "never unpickled"),
    "structured": (npy(np.zeros(3, dtype=[("a", "f4")])), "structured"),
    "complex": (npy(np.zeros(3, dtype=complex)), "c16"),
    "integers": (npy(np.zeros((3, 2), np.int64)), "holds torch.int64, expected uint8"),
    "no-examples": (npy(np.zeros((0, 2), np.uint8)), "at least one example"),
    "scalar": (npy(np.float32(3)), "at least one example"),
}


@pytest.mark.parametrize("name", BAD_NPY)
def test_bad_npy(tmp_path, name):
    content, message = BAD_NPY[name]
    path = tmp_path / f"{name}.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        fv.data.open(path)
    assert str(path) in str(caught.value)


def test_folders(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing, expected train-images-idx3-ubyte\[.gz\] or train.npy"):
        fv.data.open(tmp_path)
    write_folder(tmp_path, zipped=False)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte, .* expected t10k-images.* for split 'test'"):
        fv.data.open(tmp_path, split="test")
    with pytest.raises(DataError, match=r"nowhere.*does not exist"):
        fv.data.open(tmp_path / "nowhere")
    np.savez(tmp_path / "x.npz", x=images())
    with pytest.raises(DataError, match="archive"):
        fv.data.open(tmp_path / "x.npz")


def test_labels(tmp_path):
    write_folder(tmp_path, zipped=False)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.arange(19)))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte: has shape \(19,\), expected \(20,\)"):
        fv.data.open(tmp_path)
    labels.write_bytes(GOOD)
    with pytest.raises(DataError, match="0x00000803, expected 0x00000801"):
        fv.data.open(tmp_path)
    with pytest.raises(DataError, match=r"missing.*does not exist"):
        fv.data.open(tmp_path, labels=tmp_path / "missing")
    np.save(tmp_path / "y.npy", np.zeros(20, np.float32))
    with pytest.raises(DataError, match=r"y.npy: holds torch.float32"):
        fv.data.open(tmp_path, labels=tmp_path / "y.npy")
    with pytest.raises(ValueError, match=r"labels are \(19,\), expected \(20,\)"):
        fv.data.open(images(), labels=torch.arange(19))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fv.data.open([1, 2]), TypeError, "data is list"),
        (lambda: fv.data.open(np.array(["a"])), ValueError, "<U1"),
        (lambda: fv.data.open(np.array([None])), ValueError, "object"),
        (lambda: fv.data.open(torch.zeros(3, 2, dtype=torch.int64)), ValueError, "torch.int64"),
        (lambda: fv.data.open(torch.zeros(0, 2)), ValueError, r"\(0, 2\)"),
        (lambda: fv.data.open(torch.zeros(3, 2, device="meta")), ValueError, "meta"),
        (lambda: fv.data.open(torch.zeros(3, 2), labels=torch.zeros(3)), ValueError, "labels are torch.float32"),
        (lambda: fv.data.open("digits", split="validation"), ValueError, "validation"),
        (lambda: fv.data.open("digits", labels=torch.zeros(3)), ValueError, "have their own"),
    ],
)
def test_misuse_of_open(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0, expected at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0"),
        ({"batch_size": 21, "drop_last": True}, ValueError, "batch_size is 21, but drop_last leaves nothing of 20"),
        ({"batch_size": 5, "world_size": 2}, ValueError, "multiple of world_size 2"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, ValueError, "rank is 2, expected from 0 to 1"),
        ({"batch_size": 4, "seed": -1}, ValueError, "seed is -1"),
        ({"batch_size": 4, "threads": 0}, ValueError, "threads is 0"),
        ({"batch_size": 4, "prefetch": -1}, ValueError, "prefetch is -1"),
        ({"batch_size": 4, "fixed_epoch": -1}, ValueError, "fixed_epoch is -1"),
        ({"batch_size": 4, "transform": [torch.sigmoid]}, TypeError, "transform is"),
        ({"batch_size": 4, "transform": [fv.data.Scale(-1, 1), fv.data.Binarize()]}, ValueError, "comes first"),
        ({"batch_size": 4, "transform": [fv.data.Binarize(), fv.data.Dequantize()]}, ValueError, "comes first"),
    ],
)
def test_misuse_of_the_loader(arguments, error, message):
    with pytest.raises(error, match=message):
        fv.data.Loader(fv.data.open(images()), **arguments)


def test_transforms_that_make_no_sense():
    with pytest.raises(ValueError, match=r"bytes, but the dataset is torch.float32"):
        fv.data.Loader(fv.data.open(torch.zeros(4, 2)), 2, transform=fv.data.Dequantize())
    with pytest.raises(ValueError, match="no interval"):
        fv.data.Scale(1.0, 1.0)
    with pytest.raises(TypeError, match="dataset is Tensor"):
        fv.data.Loader(torch.zeros(4, 2), 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [None, fv.data.Scale(), fv.data.Binarize()])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_nan_is_named_at_its_batch(dtype, transform, bad):
    x = torch.rand(40, 6).to(dtype)
    x[17, 4] = bad
    loader = fv.data.Loader(fv.data.open(x), 5, transform=transform, shuffle=False)
    passed = iter(loader)
    for _ in range(3):
        next(passed)
    with pytest.raises(DataError, match=r"memory: example 17 holds a NaN or an infinity \(element 4 of 6\)"):
        next(passed)
    assert loader.position == 15


def test_a_file_that_shrinks(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((100, 1000), np.uint8))
    loader = fv.data.Loader(fv.data.open(path), 10)
    assert sum(len(batch.x) for batch in loader) == 100
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(DataError, match=r"x.npy: shrank to 5000 bytes while it was open, expected 100128"):
        iter(loader)
    path.unlink()
    with pytest.raises(DataError, match=r"x.npy: cannot be read any more"):
        iter(loader)
