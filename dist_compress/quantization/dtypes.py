"""The numbers a tensor is quantized to: integers of 2 to 8 and 16 bits, 8-bit floats, and the two signs.

Integers have an inclusive range [quant_min, quant_max]; narrow ones are stored in int8 or uint8. The 8-bit floats are
those of Micikevicius et al. 2022, arXiv:2209.05433 (OCP FP8): e4m3 without infinities, e5m2 as IEEE would have it.
Of `binary` (Courbariaux et al. 2016, arXiv:1602.02830) -1 and +1 are all there is, so nothing is zero; int8 holds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_compress.errors import UserError


@dataclass(frozen=True)
class QuantDtype:
    """`QuantDtype("int8", -128, 127, torch.int8)`."""

    name: str
    quant_min: int  # of a float: minus its largest number
    quant_max: int
    storage: torch.dtype

    @property
    def is_float(self) -> bool:
        return self.storage.is_floating_point

    @property
    def is_binary(self) -> bool:
        return self.name == "binary"

    @property
    def is_integer(self) -> bool:
        """Whole numbers in a row: rounded and clipped, zero among them."""
        return not (self.is_float or self.is_binary)

    @property
    def bits(self) -> int:
        """That a number takes."""
        if self.is_float:
            return 8 * self.storage.itemsize
        return 1 if self.is_binary else (self.quant_max - self.quant_min).bit_length()

    @property
    def is_signed(self) -> bool:
        return self.quant_min < 0

    @property
    def num_levels(self) -> int:
        return 2 if self.is_binary else self.quant_max - self.quant_min + 1


def _integers() -> dict[str, QuantDtype]:
    found = {}
    for bits in (*range(2, 9), 16):
        storage = torch.int8 if bits <= 8 else torch.int16
        found[f"int{bits}"] = QuantDtype(f"int{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, storage)
    for bits in range(2, 9):
        found[f"uint{bits}"] = QuantDtype(f"uint{bits}", 0, 2**bits - 1, torch.uint8)
    return found


DTYPES: dict[str, QuantDtype] = {
    **_integers(),
    "binary": QuantDtype("binary", -1, 1, torch.int8),
    "fp8_e4m3": QuantDtype("fp8_e4m3", -448, 448, torch.float8_e4m3fn),
    "fp8_e5m2": QuantDtype("fp8_e5m2", -57344, 57344, torch.float8_e5m2),
}
BIAS = QuantDtype("int32", -(2**31), 2**31 - 1, torch.int32)  # what integer kernels add; not for users to choose
SCHEMES = ("affine", "symmetric", "symmetric_restricted")


def find(name: str, scheme: str, key: str) -> QuantDtype:
    """The dtype of a name, cut to its restricted range where `scheme` says so: -127..127 of int8. Raises UserError
    for a name or a pair that does not exist; `key` says where they stand."""
    if name not in DTYPES:
        raise UserError(f"{key}: quant_dtype={name!r} is none of {', '.join(DTYPES)}.")
    if scheme not in SCHEMES:
        raise UserError(f"{key}: quant_scheme={scheme!r} is none of {', '.join(SCHEMES)}.")
    dtype = DTYPES[name]
    if not dtype.is_integer and scheme != "symmetric":
        raise UserError(
            f"{key}: quant_scheme={scheme!r} with quant_dtype={name!r}, which has no zero point and a range that is "
            "symmetric already. Use quant_scheme: symmetric."
        )
    if scheme == "symmetric_restricted":
        if not dtype.is_signed:
            raise UserError(
                f"{key}: quant_scheme={scheme!r} with quant_dtype={name!r}: only signed integers have one number too "
                "many below zero. Use symmetric or affine."
            )
        return QuantDtype(name, dtype.quant_min + 1, dtype.quant_max, dtype.storage)
    return dtype
