"""What a stored teacher says of a token, in a fixed number of bytes.

    dense_fp16   the log-probabilities of all classes                                        2 V bytes
    topk_u8      k ids | k values | log of the mass of the rest, fp16 | lowest and highest value, fp16
    topk_fp16    the same with values in fp16 and without their bounds

Ids are packed in as many bits as the largest needs; 206 bytes a token for k = 64 of 128,256 entries. A top-k without
the mass of the rest is biased: what is left out must not be spread over what is kept (Sparse Logit Sampling,
arXiv:2503.16870). Log-probabilities at temperature 1 give those of the k entries among each other at any temperature;
the mass of the rest does not follow, so it is stored for each temperature that is to be served. Nothing here is
collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dist_compress.distillation.losses import TopK
from dist_compress.errors import UserError

NAMES = ("dense_fp16", "topk_u8", "topk_fp16")
FEW = 1000  # classes that `auto` stores densely
_LEAST = -100.0  # log-probabilities below are stored as this
_CERTAIN = -(2.0**-24)  # the rest's log-mass at most: some is left for the k entries
Bytes = np.ndarray  # uint8


@dataclass(frozen=True)
class Encoding:
    """How records of tokens with `num_classes` logits are written and read."""

    name: str
    num_classes: int
    k: int = 64  # of a top-k
    temperatures: tuple[float, ...] = (1.0,)  # that a top-k serves

    @classmethod
    def choose(cls, name: str, num_classes: int, k: int, temperatures: tuple[float, ...]) -> Encoding:
        """`auto`: dense for few classes. Raises UserError."""
        if name == "auto":
            name = "dense_fp16" if num_classes <= FEW else "topk_u8"
        if wrong := [tau for tau in temperatures if not tau > 0]:
            raise UserError(f"distillation.store.temperatures={list(temperatures)}: {wrong[0]} is not above 0.")
        if name.startswith("topk") and k > num_classes:
            raise UserError(f"distillation.store.k={k}: there are {num_classes} classes. Lower it, or use dense_fp16.")
        return cls(name, num_classes, k, temperatures)

    @property
    def record_bytes(self) -> int:
        if self.name == "dense_fp16":
            return 2 * self.num_classes
        values = self.k + 4 if self.name == "topk_u8" else 2 * self.k
        return self._id_bytes + values + 2 * len(self.temperatures)

    @property
    def _id_bits(self) -> int:
        return max((self.num_classes - 1).bit_length(), 1)

    @property
    def _id_bytes(self) -> int:
        return -(-self.k * self._id_bits // 8)

    def encode(self, logits: torch.Tensor) -> Bytes:
        """[T, record_bytes] of logits [T, num_classes]."""
        values = logits.float()
        log_probs = values.log_softmax(1)
        if self.name == "dense_fp16":
            return _as_bytes(log_probs.cpu().numpy().astype("<f2"))
        top = log_probs.topk(self.k, dim=1)
        rest = values.scatter(1, top.indices, -torch.inf)
        tails = [
            (rest / tau).logsumexp(1) - (values / tau).logsumexp(1) for tau in self.temperatures
        ]  # fmt: skip
        ids = pack(top.indices.cpu().numpy(), self._id_bits)
        tail = _as_bytes(torch.stack(tails, 1).cpu().numpy().astype("<f2"))
        head = top.values.clamp(min=_LEAST).cpu().numpy()
        if self.name == "topk_fp16":
            return np.concatenate([ids, _as_bytes(head.astype("<f2")), tail], 1)
        low, high = _rounded(head.min(1), down=True), _rounded(head.max(1), down=False)
        width = np.maximum(high.astype(np.float32) - low.astype(np.float32), np.float32(1e-9))
        levels = np.rint((head - low.astype(np.float32)[:, None]) / width[:, None] * 255).astype(np.uint8)
        return np.concatenate([ids, levels, tail, _as_bytes(np.stack([low, high], 1).astype("<f2"))], 1)

    def decode(self, records: Bytes, temperature: float) -> torch.Tensor | TopK:
        """Logits [T, num_classes] of a dense encoding (for any temperature), the TopK at `temperature` of another, on
        the CPU. Raises UserError for a temperature that is not served."""
        self.check_temperature(temperature)
        if self.name == "dense_fp16":
            return torch.from_numpy(_as_numbers(records).astype(np.float32))
        ids = torch.from_numpy(unpack(records[:, : self._id_bytes], self.k, self._id_bits))
        rest = records[:, self._id_bytes :]
        if self.name == "topk_fp16":
            head, rest = _as_numbers(rest[:, : 2 * self.k]).astype(np.float32), rest[:, 2 * self.k :]
            numbers = _as_numbers(rest)
        else:
            numbers = _as_numbers(rest[:, self.k :])
            low, high = numbers[:, -2, None].astype(np.float32), numbers[:, -1, None].astype(np.float32)
            head = low + rest[:, : self.k].astype(np.float32) / 255 * (high - low)
        tail = torch.from_numpy(numbers[:, self.temperatures.index(temperature)].astype(np.float32)).clamp(max=_CERTAIN)
        own = (torch.from_numpy(head) / temperature).log_softmax(1)
        return TopK(ids, own + torch.log(-torch.expm1(tail))[:, None], tail)

    def check_temperature(self, temperature: float) -> None:
        """Raise UserError for one that the records do not tell the mass of the rest of."""
        if self.name != "dense_fp16" and temperature not in self.temperatures:
            raise UserError(
                f"temperature {temperature:g}: the stored top-{self.k} serves {', '.join(map(str, self.temperatures))} "
                "only. Use one of these, or write the store with distillation.store.temperatures that name it; "
                "ramps need dense_fp16."
            )


def pack(ids: np.ndarray, bits: int) -> Bytes:
    """[T, ceil(k * bits / 8)] of ids [T, k] below 2^bits; most significant bit first."""
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits((ids[:, :, None] >> shifts & 1).astype(np.uint8).reshape(len(ids), -1), axis=1)


def unpack(packed: Bytes, k: int, bits: int) -> np.ndarray:
    """The inverse: int64 [T, k]."""
    ones = np.unpackbits(packed, axis=1, count=k * bits).reshape(len(packed), k, bits)
    return ones.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1))


def _as_bytes(numbers: np.ndarray) -> Bytes:
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(len(numbers), -1)


def _as_numbers(records: Bytes) -> np.ndarray:
    return np.ascontiguousarray(records).view("<f2")


def _rounded(values: np.ndarray, down: bool) -> np.ndarray:
    """To fp16, never inwards: every value lies between the bounds that are read back."""
    half = values.astype(np.float16)
    wrong = half.astype(np.float32) > values if down else half.astype(np.float32) < values
    return np.where(wrong, np.nextafter(half, np.float16(-np.inf if down else np.inf)), half)
