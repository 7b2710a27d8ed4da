"""A dataset: examples of one shape and type in memory or mapped from a file, and perhaps a label for each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ferrovae.data._rust import DataError

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Beyond this many bytes the fingerprint reads evenly spaced blocks instead of everything.
_FULL_HASH = 128 << 20
_BLOCK = 64 << 10


class Dataset:
    """N examples `[N, *shape]` on the CPU; made by `ferrovae.data.open`.

    Args:
        data: [N, ...] uint8, float16, bfloat16, float32 or float64, N >= 1; shared, not copied, when contiguous.
            Two trailing axes are an image and get a channel axis: [N, H, W] -> examples (1, H, W).
        labels: [N] of an integer dtype, or None.
        name: what messages call it.
        split: which part of a larger whole it is.
        file: a mapped file and its length, checked again before each pass.

    Raises:
        ValueError: a shape or dtype is none of these.
    """

    def __init__(
        self,
        data: Tensor,
        labels: Tensor | None = None,
        *,
        name: str = "memory",
        split: str = "train",
        file: tuple[str, int] | None = None,
    ) -> None:
        if data.device.type != "cpu":
            raise ValueError(f"open: data is on {data.device}, expected a CPU tensor (batches move with device=)")
        if data.dtype not in DTYPES:
            raise ValueError(f"open: data is {data.dtype}, expected uint8, float16, bfloat16, float32 or float64")
        if data.ndim == 0 or data.numel() == 0:
            raise ValueError(
                f"open: data is {tuple(data.shape)}, expected at least one example of at least one element"
            )
        data = data.detach().contiguous()
        self.data = data.unsqueeze(1) if data.ndim == 3 else data
        self.labels = None if labels is None else _checked_labels(labels, len(data), name)
        self.name, self.split = name, split
        self._file = file

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example: (C, H, W) for images."""
        return tuple(self.data.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The elements' type in the file or array."""
        return self.data.dtype

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with the shape, type, examples or labels.

        Datasets above 128 MiB are sampled: 64 KiB at each of 2048 evenly spaced places.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.data, self.labels):
            if part is None:
                continue
            digest.update(json.dumps([list(part.shape), str(part.dtype)]).encode())
            content = part.reshape(-1).view(torch.uint8)
            if len(content) <= _FULL_HASH:
                digest.update(content.numpy().data)
            else:
                places = _FULL_HASH // _BLOCK
                for place in range(places):
                    start = (len(content) - _BLOCK) * place // (places - 1)
                    digest.update(content[start : start + _BLOCK].numpy().data)
        return digest.hexdigest()

    def __getitem__(self, indices: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The examples as they are stored: [*shape] for an int, else [n, *shape]."""
        if isinstance(indices, (int, slice, Tensor)):
            return self.data[indices]
        return self.data[torch.as_tensor(indices, dtype=torch.int64)]

    def subset(self, start: int, stop: int, *, split: str | None = None) -> Dataset:
        """Examples `start` to `stop` (exclusive), sharing memory; `split` renames the part."""
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"subset: {start}:{stop} is not a non-empty part of {len(self)} examples")
        part = Dataset(
            self.data[start:stop],
            None if self.labels is None else self.labels[start:stop],
            name=self.name,
            split=self.split if split is None else split,
            file=self._file,
        )
        part.data = self.data[start:stop]
        return part

    @property
    def mapped(self) -> bool:
        """Whether the examples are read from a file as they are needed."""
        return self._file is not None

    def verify(self) -> None:
        """Check that a mapped file is as long as it was; reading past its end would kill the process."""
        if self._file is None:
            return
        path, expected = self._file
        try:
            found = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read any more ({error.strerror})") from error
        if found < expected:
            raise DataError(f"{path}: shrank to {found} bytes while it was open, expected {expected}")

    def __repr__(self) -> str:
        labels = "" if self.labels is None else ", labelled"
        return f"Dataset({self.name!r}, {self.split!r}, {len(self)} x {self.shape} {self.dtype}{labels})"


def _checked_labels(labels: Tensor, examples: int, name: str) -> Tensor:
    if labels.dtype not in INTEGERS:
        raise ValueError(f"open: labels are {labels.dtype}, expected integers")
    if labels.shape != (examples,):
        raise ValueError(f"open: labels are {tuple(labels.shape)}, expected ({examples},) to match {name}")
    return labels.detach().to("cpu", torch.int64).contiguous()
