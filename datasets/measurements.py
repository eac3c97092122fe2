"""Measurements with all that is needed to reconstruct them: one HDF5 file, described in docs/measurements.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.datasets.orientation import CANONICAL, Affine, Storage, checked_affine, spacing_of
from invdiff.files import existing_file, whole_file

SCHEMA = "invdiff.measurements/1"


@dataclass(frozen=True, eq=False)
class Measurements:
    """y = A(x) + noise of one scan, and where x lies.

    Args:
        y: (s ...), axis 0 the slice; real or complex, finite.
        kind: name of the operator's entry point, such as "parallel".
        fields: the operator's fields by name: numbers, booleans, strings, None, (nested) sequences of them, or
            tensors. Lists become tuples.
        affine: 4 x 4, float64: voxel index (w, h, s) of the image (s c h w) that the operator takes, to RAS mm.
        unit: of that image: "1/mm" for CT, "a.u." for MR.
        sigma_y: standard deviation of one real component of the noise in y, in y's unit; 0 is noiseless.
        sqrt_w: instead of sigma_y, one over the standard deviation of each element of y; real, broadcasts to y.
        mu_water: attenuation of water in 1/mm by which 1/mm becomes HU, where the image is attenuation.
        simulated: True for a simulation, False for what a scanner measured.
        source_sha256: of the file(s) that this came from.
        storage: in which axis order the image is to be stored.
        history: what was done to the scanner's data before, and what their header says; can be written as JSON.
        keep: bool, broadcasts to y: False where y holds no measurement (rays behind metal or beside the detector,
            k-space that was lost); None where it holds one everywhere. Every slice keeps something.

    Raises:
        ValueError: not exactly one of sigma_y and sqrt_w, a value that is NaN or infinite or of the wrong sign, a
            shape that does not fit, a field that cannot be stored.
    """

    y: Tensor
    kind: str
    fields: Mapping[str, Any]
    affine: Affine
    unit: str
    sigma_y: float | None = None
    sqrt_w: Tensor | None = None
    mu_water: float | None = None
    simulated: bool = False
    source_sha256: str = ""
    storage: Storage = CANONICAL
    history: Mapping[str, Any] = field(default_factory=dict)
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.kind or not self.unit:
            raise ValueError(f"measurements of kind {self.kind!r} and unit {self.unit!r}; neither may be empty")
        _check_finite(self.y, "y")
        if self.y.ndim < 2 or 0 in self.y.shape:
            raise ValueError(f"y has shape {tuple(self.y.shape)}; slices and at least one more axis are wanted")
        self._check_noise()
        if self.keep is not None:
            _check_keep(self.keep, self.y)
        if self.mu_water is not None and not 0 < self.mu_water < math.inf:
            raise ValueError(f"mu_water is {self.mu_water}; a positive number in 1/mm is wanted")
        object.__setattr__(self, "affine", checked_affine(self.affine, "measurements"))
        object.__setattr__(self, "fields", {k: _checked_field(k, v) for k, v in self.fields.items()})

    def _check_noise(self) -> None:
        if (self.sigma_y is None) == (self.sqrt_w is None):
            raise ValueError("one of sigma_y and sqrt_w is wanted, not both and not none")
        if self.sigma_y is not None and not 0 <= self.sigma_y < math.inf:
            raise ValueError(f"sigma_y is {self.sigma_y}; a finite number of at least 0 is wanted")
        if self.sqrt_w is None:
            return
        _check_finite(self.sqrt_w, "sqrt_w")
        if self.sqrt_w.is_complex() or bool((self.sqrt_w < 0).any()):
            raise ValueError("sqrt_w has complex or negative values; real ones of at least 0 are wanted")
        if not _fits(self.sqrt_w, self.y):
            raise ValueError(f"sqrt_w of shape {tuple(self.sqrt_w.shape)} does not fit y of {tuple(self.y.shape)}")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances in mm between neighbouring slices, rows and columns (s h w) of the image."""
        return spacing_of(self.affine)


def write_measurements(path: str | Path, scans: Sequence[Measurements]) -> None:
    """One or several scans to one HDF5 file, whole or not at all; an existing file is replaced.

    Args:
        path: of the file.
        scans: one is written at the root, several as /scan_0000, /scan_0001 and so on.

    Raises:
        ValueError: no scan, a dtype that HDF5 does not hold, or a path that cannot be written.
    """
    import h5py

    if not scans:
        raise ValueError("no measurements to write; at least one scan is wanted")
    with whole_file(Path(path)) as part, h5py.File(part, "w") as file:
        file.attrs["schema"] = SCHEMA
        if len(scans) == 1:
            _write_scan(file, scans[0])
        for n, scan in enumerate(scans if len(scans) > 1 else []):
            _write_scan(file.create_group(f"scan_{n:04d}"), scan)


def read_measurements(path: str | Path) -> list[Measurements]:
    """All scans of a file that ``write_measurements`` wrote, bit for bit.

    Raises:
        ValueError: no HDF5 or a truncated file, another schema, a missing part (named), parts that do not fit together,
            values that are NaN or infinite.
    """
    import h5py

    path = existing_file(path)
    try:
        with h5py.File(path, "r") as file:
            schema = file.attrs.get("schema")
            if schema != SCHEMA:
                raise ValueError(f"its schema is {schema!r}; {SCHEMA!r} is wanted")
            names = sorted(name for name in file if name.startswith("scan_"))
            return [_read_scan(file[name]) for name in names] if names else [_read_scan(file)]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is not a whole file of measurements: {error}") from error


def _write_scan(group: Any, scan: Measurements) -> None:
    group["y"] = _array(scan.y, "y")
    operator = group.create_group("operator")
    operator.attrs["kind"] = scan.kind
    tensors = {k: v for k, v in scan.fields.items() if isinstance(v, Tensor)}
    operator.attrs["fields"] = json.dumps({k: v for k, v in scan.fields.items() if k not in tensors})
    for key, value in tensors.items():
        operator[key] = _array(value, key)
    geometry = group.create_group("geometry")
    geometry["affine"] = scan.affine
    geometry["spacing_mm"] = np.array(scan.spacing_mm)
    geometry.attrs["stored_axes"] = list(scan.storage.axes)
    geometry.attrs["stored_flips"] = list(scan.storage.flips)
    noise = group.create_group("noise")
    if scan.sigma_y is not None:
        noise["sigma_y"] = float(scan.sigma_y)
    if scan.sqrt_w is not None:
        noise["sqrt_w"] = _array(scan.sqrt_w, "sqrt_w")
    if scan.keep is not None:
        group["keep"] = _array(scan.keep, "keep")
    group.attrs["unit"] = scan.unit
    if scan.mu_water is not None:
        group.attrs["mu_water"] = float(scan.mu_water)
    group.attrs["simulated"] = bool(scan.simulated)
    group.attrs["source_sha256"] = scan.source_sha256
    if scan.history:
        group.attrs["history"] = json.dumps(dict(scan.history))


def _read_scan(group: Any) -> Measurements:
    operator = _part(group, "operator")
    fields = json.loads(_attribute(operator, "fields"))
    if not isinstance(fields, dict):
        raise ValueError(f"{operator.name} has fields {fields!r}; a JSON object is wanted")
    fields.update({key: _tensor(value) for key, value in operator.items()})
    geometry, noise = _part(group, "geometry"), _part(group, "noise")
    axes = [int(v) for v in _attribute(geometry, "stored_axes")]
    flips = [bool(v) for v in _attribute(geometry, "stored_flips")]
    scan = Measurements(
        y=_tensor(_part(group, "y")),
        kind=str(_attribute(operator, "kind")),
        fields=fields,
        affine=_part(geometry, "affine")[()],
        unit=str(_attribute(group, "unit")),
        sigma_y=float(noise["sigma_y"][()]) if "sigma_y" in noise else None,
        sqrt_w=_tensor(noise["sqrt_w"]) if "sqrt_w" in noise else None,
        mu_water=float(group.attrs["mu_water"]) if "mu_water" in group.attrs else None,
        simulated=bool(_attribute(group, "simulated")),
        source_sha256=str(_attribute(group, "source_sha256")),
        storage=Storage(tuple(axes), tuple(flips)),  # type: ignore[arg-type]
        history=json.loads(group.attrs["history"]) if "history" in group.attrs else {},
        keep=_tensor(group["keep"]) if "keep" in group else None,
    )
    spacing = np.asarray(_part(geometry, "spacing_mm")[()])
    if spacing.shape != (3,) or not np.allclose(spacing, scan.spacing_mm, rtol=1e-6, atol=0):
        raise ValueError(f"{geometry.name}/spacing_mm is {spacing.tolist()}, the affine says {scan.spacing_mm}")
    return scan


def _part(group: Any, key: str) -> Any:
    if key not in group:
        raise ValueError(f"{group.name.rstrip('/')}/{key} is missing")
    return group[key]


def _attribute(group: Any, key: str) -> Any:
    if key not in group.attrs:
        raise ValueError(f"{group.name} lacks the attribute {key}")
    return group.attrs[key]


def _array(value: Tensor, name: str) -> np.ndarray:
    try:
        return value.detach().cpu().resolve_conj().resolve_neg().numpy()
    except TypeError as error:
        raise ValueError(f"{name} is {value.dtype}, which HDF5 does not hold") from error


def _tensor(dataset: Any) -> Tensor:
    array = np.asarray(dataset[()])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _check_finite(value: Tensor, name: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(f"{bad} of {value.numel()} values of {name} are NaN or infinite; all must be finite")


def _fits(value: Tensor, y: Tensor) -> bool:
    """Whether ``value`` broadcasts to y."""
    sizes = zip(reversed(value.shape), reversed(y.shape), strict=False)
    return value.ndim <= y.ndim and all(a in (1, b) for a, b in sizes)


def _check_keep(keep: Tensor, y: Tensor) -> None:
    if keep.dtype != torch.bool or not _fits(keep, y):
        raise ValueError(f"keep is {tuple(keep.shape)} {keep.dtype}; bool that fits y of {tuple(y.shape)} is wanted")
    empty = (~keep.expand(y.shape).flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"keep leaves nothing of slices {empty}; at least one measurement a slice is wanted")


def _checked_field(key: str, value: Any) -> Any:
    """``value`` with lists as tuples; ValueError if it cannot be stored and read back the same."""
    if not key.isidentifier():
        raise ValueError(f"{key!r} is not the name of a field")
    if isinstance(value, Tensor):
        _check_finite(value, key)
        return value
    if isinstance(value, list | tuple):
        if any(isinstance(v, Tensor) for v in value):
            raise ValueError(f"field {key} holds a sequence of tensors; stack them into one")
        return tuple(_checked_field(key, v) for v in value)
    if value is not None and type(value) not in (bool, int, float, str):
        wanted = "a number, a string, a sequence of them or a tensor"
        raise ValueError(f"field {key} holds {type(value).__name__}; {wanted} is wanted")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"field {key} holds {value}; a finite number is wanted")
    return value
