"""Datasets and the loader over Rust: deterministic, resumable, whole batches at a time."""

from ferrovae.data._rust import DataError
from ferrovae.data.batches import Batch
from ferrovae.data.dataset import Dataset
from ferrovae.data.loader import Loader
from ferrovae.data.reading import open
from ferrovae.data.transforms import Binarize, Dequantize, Scale, Transform

__all__ = ["Batch", "Binarize", "DataError", "Dataset", "Dequantize", "Loader", "Scale", "Transform", "open"]
