"""What a stored teacher says of a token, in a fixed number of bytes.

    dense_fp16   the log-probabilities of all classes                                        2 V bytes
    topk_u8      k ids | k values | log of the mass of the rest, fp16 | lowest and highest value, fp16 | draws
    topk_fp16    the same with values in fp16 and without their bounds
    draws        ids of some of the rest | entropy of the rest, fp16

Ids are packed in as many bits as the largest needs. A top-k without the mass of the rest is biased: what is left out
must not be spread over what is kept (Sparse Logit Sampling, arXiv:2503.16870). Nor is its mass alone enough: at
temperature 2 a small language model has a seventh of it outside of the 64 likeliest of 259 entries, and a student that
is told nothing of how it lies there ends worse. So some of the rest is drawn, each entry in proportion to its
probability; such a gradient is noisy, but right on average, and a training takes the average over many tokens.
Log-probabilities at temperature 1 give those of the k entries among each other at any temperature; the rest does not
follow, so its mass and draws are stored for each temperature that is to be served. Nothing here is collective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dist_compress.distillation.losses import CHUNK_ELEMENTS, TopK
from dist_compress.errors import UserError
from dist_compress.hashing import uniform

NAMES = ("dense_fp16", "topk_u8", "topk_fp16")
FEW = 1000  # classes that `auto` stores densely
_LEAST = -100.0  # log-probabilities below are stored as this
_DRAWS = 0xD4A  # purpose of the hash
_CERTAIN = -(2.0**-24)  # the rest's log-mass at most: some is left for the k entries
Bytes = np.ndarray  # uint8


@dataclass(frozen=True)
class Encoding:
    """How records of tokens with `num_classes` logits are written and read."""

    name: str
    num_classes: int
    k: int = 64  # of a top-k
    temperatures: tuple[float, ...] = (1.0,)  # that a top-k serves
    draws: int = 0  # entries of the rest, for each temperature

    @classmethod
    def choose(cls, name: str, num_classes: int, k: int, temperatures: tuple[float, ...], draws: int = 0) -> Encoding:
        """`auto`: dense for few classes. Raises UserError."""
        if name == "auto":
            name = "dense_fp16" if num_classes <= FEW else "topk_u8"
        if wrong := [tau for tau in temperatures if not tau > 0]:
            raise UserError(f"distillation.store.temperatures={list(temperatures)}: {wrong[0]} is not above 0.")
        if name.startswith("topk") and k > num_classes:
            raise UserError(f"distillation.store.k={k}: there are {num_classes} classes. Lower it, or use dense_fp16.")
        return cls(name, num_classes, k, temperatures, draws)

    @property
    def record_bytes(self) -> int:
        if self.name == "dense_fp16":
            return 2 * self.num_classes
        values = self.k + 4 if self.name == "topk_u8" else 2 * self.k
        return self._id_bytes(self.k) + values + len(self.temperatures) * (2 + self._drawn_bytes)

    @property
    def _id_bits(self) -> int:
        return max((self.num_classes - 1).bit_length(), 1)

    def _id_bytes(self, count: int) -> int:
        return -(-count * self._id_bits // 8)

    @property
    def _drawn_bytes(self) -> int:
        """Of one temperature."""
        return self._id_bytes(self.draws) + 2 if self.draws else 0

    def encode(self, logits: torch.Tensor, tokens: torch.Tensor) -> Bytes:
        """[T, record_bytes] of logits [T, num_classes]. `tokens`: int64 [T], by which draws are made."""
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
        drawn = [self._draw(rest / tau, tokens) for tau in self.temperatures if self.draws]
        if self.name == "topk_fp16":
            return np.concatenate([ids, _as_bytes(head.astype("<f2")), tail, *drawn], 1)
        low, high = _rounded(head.min(1), down=True), _rounded(head.max(1), down=False)
        width = np.maximum(high.astype(np.float32) - low.astype(np.float32), np.float32(1e-9))
        levels = np.rint((head - low.astype(np.float32)[:, None]) / width[:, None] * 255).astype(np.uint8)
        return np.concatenate([ids, levels, tail, _as_bytes(np.stack([low, high], 1).astype("<f2")), *drawn], 1)

    def _draw(self, rest: torch.Tensor, tokens: torch.Tensor) -> Bytes:
        """[T, bytes] of `rest`: logits [T, num_classes], -inf for what is not to be drawn. Systematic: an entry with
        the share w of the mass comes floor or ceil of w * draws times."""
        start = uniform(tokens, _DRAWS).to(rest.device)
        points = (start[:, None] + torch.arange(self.draws, device=rest.device)) / self.draws
        ids, entropies = [], []
        size = max(CHUNK_ELEMENTS // self.num_classes, 1)
        for part, at in zip(rest.split(size), points.split(size), strict=True):
            share = part.double().softmax(1).nan_to_num()  # NaN: there is no rest
            total = share.cumsum(1)
            ids.append(torch.searchsorted(total, at * total[:, -1:], right=True).clamp(max=self.num_classes - 1))
            entropies.append(torch.special.entr(share).sum(1))
        packed = pack(torch.cat(ids).cpu().numpy(), self._id_bits)
        return np.concatenate([packed, _as_bytes(torch.cat(entropies)[:, None].cpu().numpy().astype("<f2"))], 1)

    def decode(self, records: Bytes, temperature: float) -> torch.Tensor | TopK:
        """Logits [T, num_classes] of a dense encoding (for any temperature), the TopK at `temperature` of another, on
        the CPU. Raises UserError for a temperature that is not served."""
        self.check_temperature(temperature)
        if self.name == "dense_fp16":
            return torch.from_numpy(_as_numbers(records))
        number, drawn_bytes = len(self.temperatures), self._drawn_bytes
        sizes = [self._id_bytes(self.k), self.k * (2 if self.name == "topk_fp16" else 1), 2 * number]
        sizes += [0 if self.name == "topk_fp16" else 4, *[drawn_bytes] * number]
        ids, head, tails, bounds, *drawn = np.split(records, np.cumsum(sizes)[:-1], 1)
        if self.name == "topk_fp16":
            values = _as_numbers(head)
        else:
            low, high = _as_numbers(bounds).T[:, :, None]
            values = low + head.astype(np.float32) / 255 * (high - low)
        at = self.temperatures.index(temperature)
        tail = torch.from_numpy(_as_numbers(tails)[:, at]).clamp(max=_CERTAIN)
        own = (torch.from_numpy(values) / temperature).log_softmax(1) + torch.log(-torch.expm1(tail))[:, None]
        known = TopK(torch.from_numpy(unpack(ids, self.k, self._id_bits)), own, tail, torch.zeros_like(tail))
        return self._with_draws(known, drawn[at]) if self.draws else known

    def _with_draws(self, known: TopK, drawn: Bytes) -> TopK:
        """The rest is what was drawn, each entry as often as it was."""
        ids = torch.from_numpy(unpack(drawn[:, :-2], self.draws, self._id_bits))
        same = ids[:, :, None] == ids[:, None, :]
        first = ~same.tril(-1).any(2)  # an entry's mass is where it comes first
        share = same.sum(2) / self.draws * first
        entropy = torch.from_numpy(_as_numbers(drawn[:, -2:])[:, 0]) - torch.special.entr(share).sum(1)
        return TopK(
            torch.cat([known.ids, ids], 1), torch.cat([known.log_probs, known.tail[:, None] + share.log()], 1),
            torch.full_like(known.tail, -torch.inf), known.tail.exp() * entropy,
        )  # fmt: skip

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
    """float32 of fp16."""
    return np.ascontiguousarray(records).view("<f2").astype(np.float32)


def _rounded(values: np.ndarray, down: bool) -> np.ndarray:
    """To fp16, never inwards: every value lies between the bounds that are read back."""
    half = values.astype(np.float16)
    wrong = half.astype(np.float32) > values if down else half.astype(np.float32) < values
    return np.where(wrong, np.nextafter(half, np.float16(-np.inf if down else np.inf)), half)
