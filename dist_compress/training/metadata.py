"""The index file of a torch.distributed.checkpoint is a pickle: read it only when it names plain data and no code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

_OF_METADATA = "Metadata MetadataIndex TensorStorageMetadata TensorProperties ChunkStorageMetadata StorageMeta"
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (*_OF_METADATA.split(), "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise ValueError(f"its .metadata asks for {module}.{name}, which no checkpoint of ours holds")


def check(folder: Path) -> None:
    """Raise ValueError unless `folder/.metadata` can be unpickled without running code of a stranger. Local."""
    with open(folder / ".metadata", "rb") as file:
        try:
            _Plain(file).load()
        except (pickle.UnpicklingError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"its .metadata cannot be read: {error}") from None
