"""`open`: from a path, an array or a name to a `Dataset`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ferrovae.data._rust import DataError, idx_read, idx_shape, npy_header, span
from ferrovae.data.dataset import DTYPES, INTEGERS, Dataset

if TYPE_CHECKING:
    import numpy as np

    Source = str | PathLike[str] | Tensor | np.ndarray[Any, Any]

# The file names of MNIST and the datasets after it, which call the test split t10k.
_IDX_STEMS = {"train": "train", "test": "t10k"}
_NPY_DTYPES = {
    ("u", 1): torch.uint8,
    ("i", 1): torch.int8,
    ("i", 2): torch.int16,
    ("i", 4): torch.int32,
    ("i", 8): torch.int64,
    ("f", 2): torch.float16,
    ("f", 4): torch.float32,
    ("f", 8): torch.float64,
}


def open(source: Source, split: str = "train", *, labels: Source | None = None) -> Dataset:
    """A dataset from a path, an array, or a built-in name.

    Args:
        source: one of
            a folder with the files of MNIST (`train-images-idx3-ubyte`, `t10k-images-idx3-ubyte`, their labels; plain
            or .gz) or with `<split>.npy` (and perhaps `<split>-labels.npy`);
            one IDX file, plain or gzipped; one .npy file (mapped, not read, when it is C-ordered little-endian);
            a tensor or array [N, ...] of uint8, float16, bfloat16, float32 or float64, which is shared;
            `"digits"`: the 1,797 images (1, 8, 8) that scikit-learn ships, uint8, the first 1,437 for training.
        split: `"train"` or `"test"`: which files of a folder, which part of the digits. One file or one array is
            used whole, and only called so.
        labels: [N] integers, or the path of an IDX or .npy file; a folder's own are found without.

    Raises:
        DataError: a file is missing, truncated, too long, corrupt, or disagrees with its header or its labels; the
            message names the file, what was found and what was expected.
        ValueError, TypeError: an argument is not one of the above.
    """
    if isinstance(source, str) and source == "digits":
        if labels is not None:
            raise ValueError("open: labels are given, but the digits have their own")
        return _digits(split)
    if not isinstance(source, (str, PathLike)):
        array = _tensor(source, "data")
        return Dataset(array, None if labels is None else _labels(labels, len(array)), split=split)
    path = Path(source)
    if path.is_dir():
        images, found = _folder(path, split)
        labels = found if labels is None else labels
    elif path.exists():
        images = path
    else:
        raise DataError(f"{path}: does not exist, expected a file or a folder")
    data, mapped = _examples(images, 3 if path.is_dir() else None)
    return Dataset(
        data,
        None if labels is None else _labels(labels, len(data), images),
        name=str(path),
        split=split,
        file=(str(images), images.stat().st_size) if mapped else None,
    )


def _folder(path: Path, split: str) -> tuple[Path, Path | None]:
    """The images and, where there are any, the labels of `split`."""
    stem = _IDX_STEMS.get(split)
    names = [] if stem is None else [f"{stem}-images-idx3-ubyte", f"{stem}-images.idx3-ubyte"]
    images = _first(path, [*names, f"{split}.npy"])
    if images is None:
        expected = " or ".join([*(f"{name}[.gz]" for name in names[:1]), f"{split}.npy"])
        holds = sorted(entry.name for entry in path.iterdir())
        found = ", ".join(holds[:6]) + (f" and {len(holds) - 6} more" if len(holds) > 6 else "")
        raise DataError(f"{path}: holds {found or 'nothing'}, expected {expected} for split {split!r}")
    if images.suffix == ".npy":
        return images, _first(path, [f"{split}-labels.npy"])
    return images, _first(path, [f"{stem}-labels-idx1-ubyte", f"{stem}-labels.idx1-ubyte"])


def _first(path: Path, names: list[str]) -> Path | None:
    candidates = (path / (name + suffix) for name in names for suffix in ("", ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _examples(path: Path, dimensions: int | None) -> tuple[Tensor, bool]:
    """The file's array, and whether it is mapped."""
    if path.suffix == ".npz":
        raise DataError(f"{path}: is an archive of arrays, expected IDX or .npy; load one with numpy.load and pass it")
    if path.suffix != ".npy":
        return _idx(path, *((dimensions, dimensions) if dimensions else (2, 4))), False
    data, mapped = _npy(path)
    if data.dtype not in DTYPES:
        raise DataError(f"{path}: holds {data.dtype}, expected uint8, float16, float32 or float64")
    if data.ndim == 0 or data.numel() == 0:
        raise DataError(f"{path}: has shape {tuple(data.shape)}, expected at least one example")
    return data, mapped


def _labels(source: Any, examples: int, images: Path | None = None) -> Tensor:
    if not isinstance(source, (str, PathLike)):
        return _tensor(source, "labels")
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{path}: does not exist, expected a file of labels")
    labels = _npy(path)[0] if path.suffix == ".npy" else _idx(path, 1, 1)
    if labels.dtype not in INTEGERS:
        raise DataError(f"{path}: holds {labels.dtype}, expected integer labels")
    if labels.shape != (examples,):
        raise DataError(f"{path}: has shape {tuple(labels.shape)}, expected ({examples},) to match {images or 'data'}")
    return labels


def _idx(path: Path, least: int, most: int) -> Tensor:
    shape = idx_shape(path, least, most)
    data = torch.empty(shape, dtype=torch.uint8)
    idx_read(path, shape, span(data))
    return data


def _npy(path: Path) -> tuple[Tensor, bool]:
    """The array and whether it is mapped: other orders than little-endian C are copied."""
    kind, size, big_endian, fortran_order, shape, offset = npy_header(path)
    dtype = _NPY_DTYPES.get((kind, size))
    if dtype is None:
        raise DataError(f"{path}: holds elements of type {kind}{size}, expected u1, f2, f4, f8 or integer labels")
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[offset:]
    if big_endian and size > 1:
        content = content.view(-1, size).flip(-1).reshape(-1)
    elif content.data_ptr() % size:
        content = content.clone()
    data = content.view(dtype)
    if fortran_order and len(shape) > 1:
        data = data.view(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    mapped = data.untyped_storage().data_ptr() == content.untyped_storage().data_ptr()
    return data.view(shape), mapped


def _tensor(source: Any, argument: str) -> Tensor:
    if isinstance(source, Tensor):
        return source
    import numpy as np

    if not isinstance(source, np.ndarray):
        raise TypeError(f"open: {argument} is {type(source).__name__}, expected a path, a tensor or a numpy array")
    if source.dtype.hasobject or source.dtype.kind not in "uif":
        raise ValueError(f"open: {argument} is an array of {source.dtype}, expected numbers")
    array = source.astype(source.dtype.newbyteorder("="), copy=False)
    # torch shares only what it may write, in strides that go forward.
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy(order="C"))


def _digits(split: str) -> Dataset:
    parts = {"train": slice(0, 1437), "test": slice(1437, 1797)}
    if split not in parts:
        raise ValueError(f"open: split is {split!r}, expected 'train' or 'test' of the digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("open: the digits come with scikit-learn; pip install 'ferrovae[demo]'") from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    part = parts[split]
    return Dataset(images[part], torch.from_numpy(digits.target)[part], name="digits", split=split)
