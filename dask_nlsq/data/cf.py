"""Packed numbers of CF conventions: which attributes of a stored array scale its values, and which mark them as invalid.

``decoded = stored * scale_factor + add_offset``. ``_FillValue``, ``missing_value``, ``valid_min``, ``valid_max`` and
``valid_range`` are in the units of the stored values. xarray applies the same, except for the valid range.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..base.lazy import da
from ..kernels.blocks import Invalid

PACKING = ("scale_factor", "add_offset")
MISSING = ("_FillValue", "missing_value")
NEAR = 4  # times the rounding of a decoded value, within which the stored one at a limit is sought
AXES = "_ARRAY_DIMENSIONS"  # the attribute in which xarray keeps their names in Zarr format 2
VALID = ("valid_min", "valid_max", "valid_range")
PACKED = (*PACKING, *MISSING, *VALID)  # attributes that say how values are stored, and nothing of decoded ones


class Decoding(NamedTuple):
    """What the attributes of an array say of its values."""

    scale: float = 1.0
    offset: float = 0.0
    missing: tuple[float, ...] = ()  # invalid stored values
    low: float | None = None  # limits of the stored values that count
    high: float | None = None
    said: tuple[str, ...] = ()  # the attributes, as they are to be shown

    @classmethod
    def of(cls, name: str, attributes: Mapping[str, Any], dtype: np.dtype) -> Decoding | None:
        """None where nothing is to be done.

        Raises
        ------
        ValueError
            Where an attribute does not hold the numbers that it should.
        """
        given = {each: attributes.get(each) for each in PACKED}
        given = {each: value for each, value in given.items() if value is not None}
        unsigned = str(_plain(attributes.get("_Unsigned", ""))).lower()
        if (unsigned, dtype.kind) in (("true", "i"), ("false", "u")):
            raise ValueError(
                f"`{name}` has the attribute _Unsigned, by which its integers of dtype {dtype} have or lack a sign: open it "
                "with xarray, or fit the values as they are stored by decode_cf=False"
            )
        for each in PACKING:
            if each in attributes and attributes[each] is None:
                raise _wrong(name, each, None)
        if not given or dtype.kind not in "buif":
            return None
        numbers = {each: _numbers(name, each, value, dtype) for each, value in given.items()}
        for each, length in [("scale_factor", 1), ("add_offset", 1), ("valid_min", 1), ("valid_max", 1), ("valid_range", 2)]:
            found = numbers.get(each, ())
            if (found and len(found) != length) or (each in PACKING and not np.isfinite(found).all()):
                raise _wrong(name, each, given[each])
        scale, offset = (float(*numbers.get(each, ()) or (default,)) for each, default in zip(PACKING, (1, 0), strict=True))
        if scale == 0:
            raise _wrong(name, "scale_factor", given["scale_factor"])
        least, most = numbers.get("valid_range") or (-np.inf, np.inf)
        low, high = max(least, *numbers.get("valid_min", ()), -np.inf), min(most, *numbers.get("valid_max", ()), np.inf)
        how = cls(
            scale,
            offset,
            tuple(dict.fromkeys(number for each in MISSING for number in numbers.get(each, ()))),
            None if np.isinf(low) else low,
            None if np.isinf(high) else high,
            tuple(f"{each} {', '.join(f'{number:.10g}' for number in found)}" for each, found in numbers.items() if found),
        )
        return how if how.scaled or how.hides else None

    @classmethod
    def of_array(cls, name: str, array: Any) -> Decoding | None:
        """`of` the attributes of a Zarr array or h5py dataset, and of the fill value where that is one of them.

        In Zarr format 2 xarray writes the attribute ``_FillValue`` as the fill value of the array, and reads it so.
        By the name of its axes one knows that xarray, or one of its kind, has written the array.
        """
        attributes, fill_value = array.attrs, getattr(array, "fill_value", None)
        of_xarray = AXES in attributes and getattr(getattr(array, "metadata", None), "zarr_format", None) == 2
        if of_xarray and fill_value is not None and array.dtype.kind != "b":
            attributes = {**attributes, "_FillValue": fill_value}
        return cls.of(name, attributes, array.dtype)

    @property
    def scaled(self) -> bool:
        return (self.scale, self.offset) != (1.0, 0.0)

    @property
    def hides(self) -> bool:
        return bool(self.missing) or self.low is not None or self.high is not None

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """Decoded values; invalid ones like any others."""
        return stored.astype(np.float64) * self.scale + self.offset if self.scaled else stored

    def stored_limits(self, low, high, dtype) -> tuple[float | None, float | None]:
        """Limits of the stored values, within which the decoded ones are within ``low`` and ``high``."""
        if not self.scaled:
            return low, high
        ends = (self._stored_limit(low, dtype, 1), self._stored_limit(high, dtype, -1))
        return ends if self.scale > 0 else ends[::-1]

    def _stored_limit(self, limit, dtype, sign):
        """The outermost stored value whose decoded one is not beyond ``limit``: a lower limit for ``sign`` 1."""
        if limit is None or not np.isfinite(limit):
            return limit if limit is None else limit * np.sign(self.scale)
        guess = (limit - self.offset) / self.scale
        is_float = dtype.kind == "f"
        number, spacing = (dtype.type, float(np.spacing(dtype.type(abs(guess))))) if is_float else (int, 1.0)
        spread = NEAR * (np.finfo(float).eps * (abs(limit) + abs(self.offset)) / abs(self.scale) + spacing)
        if not np.isfinite(guess + spread):
            return guess
        inward = sign * np.sign(self.scale)
        inside, outside = number(guess + inward * spread), number(guess - inward * spread)
        while (middle := number((float(inside) + float(outside)) / 2)) not in (inside, outside):
            if sign * (float(middle) * self.scale + self.offset - limit) >= 0:
                inside = middle
            else:
                outside = middle
        return float(inside) if is_float else inside

    def hidden(self, stored: np.ndarray) -> np.ndarray:
        """Where ``stored`` is invalid."""
        return Invalid(self.missing, self.low, self.high).hits(stored)

    def lazily(self, array: da.Array, invalid=None) -> da.Array:
        """A Dask array of the decoded values, masked where there are none; there ``invalid`` replaces the attributes."""
        dtype = np.dtype(np.float64) if self.scaled else array.dtype
        empty = np.empty((0,) * array.ndim, dtype)
        hits = self.hidden if invalid is None and self.hides else getattr(invalid, "hits", None)
        meta = empty if hits is None and not isinstance(array._meta, np.ma.MaskedArray) else np.ma.masked_array(empty)
        return da.map_blocks(_decode, array, self, hits, dtype=dtype, meta=meta)

    def __str__(self):
        return ", ".join(self.said)


AS_STORED = Decoding()


def _decode(stored, decoding: Decoding, hits):
    plain = np.ma.getdata(stored)
    values = decoding.decoded(plain)
    if hits is None and not isinstance(stored, np.ma.MaskedArray):
        return values
    hidden = np.ma.getmaskarray(stored)
    return np.ma.masked_array(values, hidden if hits is None else hidden | hits(plain))


def _plain(value):
    """As few containers as possible around it; bytes as text."""
    value = np.asarray(value).ravel()
    value = value[0] if value.size == 1 else value
    return value.decode() if isinstance(value, bytes) else value


def _numbers(name, attribute, value, dtype) -> tuple[float, ...]:
    """The numbers of an attribute: Python's, those that are compared with stored values as ``dtype`` rounds them."""
    values = [_number(each) for each in np.asarray(value, dtype=object).ravel()]
    if None in values:
        raise _wrong(name, attribute, value)
    if attribute not in PACKING and dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = [float(dtype.type(each)) for each in values]
    if attribute in PACKING:
        values = [float(each) for each in values]
    return tuple(values)


def _number(value):
    """A number, of text too: xarray writes fill values of floats into Zarr as base64 of 8 bytes. None for anything else."""
    if isinstance(value, (bytes, str)):
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        try:
            return float(text)
        except ValueError:
            pass
        try:
            return struct.unpack("<d", base64.standard_b64decode(text))[0]
        except (binascii.Error, struct.error, ValueError):
            return None
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic) and value.dtype.kind in "buif":
        return value.item()
    return None


def _wrong(name, attribute, value):
    return ValueError(
        f"`{name}` has the attribute {attribute}={value!r}, which is not what CF conventions put there: correct it, or fit "
        "the values as they are stored by decode_cf=False"
    )
