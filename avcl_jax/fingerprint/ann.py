"""Nearest neighbours by FAISS: exact for small parts, in compressed cells for large ones."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np

from avcl_jax.fingerprint.error import FingerprintError

# From here on a part is compressed and searched in cells; a flat one of this size takes 100 MB and,
# for the queries of a ten-second clip, about a second on two cores.
IVFPQ_FROM = 200_000
_PROBES = 32
_CODE_BYTES = 32


class AnnError(FingerprintError):
    """A FAISS file cannot be read."""


def faiss() -> types.ModuleType:
    """Imports FAISS, of which only the fingerprints have need.

    Raises:
        FingerprintError: if it is not installed.
    """
    try:
        import faiss as module
    except ImportError as error:
        raise FingerprintError(
            "FAISS is not installed: pip install -r requirements-fingerprint.txt"
        ) from error
    return module


def build(vectors: np.ndarray, kind: str) -> Any:
    """Indexes vectors for search by inner product.

    Args:
        vectors: float32 [n, d].
        kind: "flat", "ivfpq" or "auto".
    """
    library = faiss()
    vectors = np.ascontiguousarray(vectors, np.float32)
    count, width = vectors.shape
    # Cells and codebooks cannot be learned from fewer.
    if kind == "flat" or (kind == "auto" and count < IVFPQ_FROM) or count < 256:
        index = library.IndexFlatIP(width)
    else:
        cells = max(1, min(4096, count // 64))
        code = next(n for n in range(min(_CODE_BYTES, width), 0, -1) if width % n == 0)
        index = library.IndexIVFPQ(
            library.IndexFlatIP(width), width, cells, code, 8, library.METRIC_INNER_PRODUCT
        )
        index.cp.seed = 1
        index.train(vectors[:: max(1, count // 400_000)])
        index.nprobe = _PROBES
    index.add(vectors)
    return index


def search(
    index: Any, queries: np.ndarray, count: int, keep: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest vectors.

    Args:
        index: of `build` or `read`.
        queries: float32 [n, d].
        count: how many to find.
        keep: bool [vectors], False for those not to be found; None for all.

    Returns:
        Similarities and row numbers [n, count]; −1 where there are fewer.
    """
    library = faiss()
    queries = np.ascontiguousarray(queries, np.float32)
    if keep is None:
        return index.search(queries, count)
    bits = np.packbits(keep, bitorder="little")
    selector = library.IDSelectorBitmap(len(keep), library.swig_ptr(bits))
    if isinstance(index, library.IndexIVF):
        parameters = library.SearchParametersIVF(sel=selector, nprobe=index.nprobe)
    else:
        parameters = library.SearchParameters(sel=selector)
    return index.search(queries, count, params=parameters)


def write(index: Any, path: Path) -> None:
    """Writes an index to a file."""
    faiss().write_index(index, str(path))


def read(path: Path) -> Any:
    """Reads an index from a file.

    Raises:
        AnnError: if it is damaged, or not there.
    """
    try:
        return faiss().read_index(str(path))
    except RuntimeError as error:  # what FAISS raises for everything
        raise AnnError(f"{path.name} is no FAISS index") from error
