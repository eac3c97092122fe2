"""The measurement file: read back bit for bit, or refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invdiff.datasets import Measurements, Storage, read_measurements, write_measurements

AFFINE = np.array([[-0.7, 0.05, 0.1, 31.0], [0.02, -0.9, 0.2, -12.5], [0.01, 0.1, 2.5, 7.0], [0, 0, 0, 1]])


def ct() -> Measurements:
    generator = torch.Generator().manual_seed(1)
    return Measurements(
        y=torch.randn(3, 1, 5, 8, generator=generator),
        kind="parallel",
        fields={
            "shape": (3, 1, 6, 7),
            "angles": tuple(np.linspace(0, 3, 5).tolist()),
            "pixel_mm": 0.1 + 0.2,
            "flag": True,
        },
        affine=AFFINE,
        unit="1/mm",
        sqrt_w=torch.rand(3, 1, 5, 8, generator=generator).double(),
        mu_water=0.0193,
        simulated=True,
        source_sha256="ab" * 32,
        storage=Storage((1, 2, 0), (False, True, True)),
    )


def mr() -> Measurements:
    generator = torch.Generator().manual_seed(2)
    coils = torch.randn(2, 3, 6, 7, dtype=torch.complex128, generator=generator)
    return Measurements(
        y=torch.randn(2, 3, 6, 7, dtype=torch.complex64, generator=generator),
        kind="cartesian",
        fields={
            "mask": torch.rand(6, 7, generator=generator) > 0.4,
            "maps": coils,
            "name": "größer",
            "nested": ((1, 2.5), ()),
        },
        affine=AFFINE * 1.1 - 0.1 * np.diag([0, 0, 0, 1]),
        unit="a.u.",
        sigma_y=1 / 3,
    )


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("scans", [[ct()], [mr()], [mr(), ct(), mr()]], ids=["ct", "mr", "three"])
def test_read_back_identically(tmp_path, scans):
    write_measurements(tmp_path / "a.h5", scans)
    back = read_measurements(tmp_path / "a.h5")
    assert len(back) == len(scans)
    for a, b in zip(scans, back, strict=True):
        for field in fields(Measurements):
            assert same(getattr(a, field.name), getattr(b, field.name)), field.name
    assert not same(replace(ct(), y=ct().y + 1e-6).y, ct().y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex128, torch.int16, torch.uint8])
def test_dtypes_and_views(tmp_path, dtype):
    y = torch.arange(48).reshape(2, 4, 6).to(dtype).transpose(1, 2)
    write_measurements(tmp_path / "a.h5", [replace(mr(), y=y.conj())])
    back = read_measurements(tmp_path / "a.h5")[0].y
    assert back.dtype == dtype and torch.equal(back, y.conj())


def test_many_fields_and_no_end_of_angles(tmp_path):
    angles = tuple(np.random.default_rng(0).random(20000).tolist())
    write_measurements(tmp_path / "a.h5", [replace(ct(), fields={"angles": angles})])
    assert read_measurements(tmp_path / "a.h5")[0].fields["angles"] == angles


def test_layout_is_the_documented_one(tmp_path):
    write_measurements(tmp_path / "a.h5", [replace(ct(), fields={"shape": [3, 1, 6, 7], "mask": torch.ones(6, 7)})])
    with h5py.File(tmp_path / "a.h5") as f:
        assert f.attrs["schema"] == "invdiff.measurements/1" and f.attrs["unit"] == "1/mm"
        assert f.attrs["simulated"] and f.attrs["mu_water"] == 0.0193 and f.attrs["source_sha256"] == "ab" * 32
        assert f["operator"].attrs["kind"] == "parallel"
        assert json.loads(f["operator"].attrs["fields"]) == {"shape": [3, 1, 6, 7]}
        assert f["operator/mask"].shape == (6, 7)
        assert np.array_equal(f["geometry/affine"], AFFINE)
        assert np.allclose(f["geometry/spacing_mm"], np.linalg.norm(AFFINE[:3, :3], axis=0)[::-1])
        assert list(f["geometry"].attrs["stored_axes"]) == [1, 2, 0] and "sigma_y" not in f["noise"]
    write_measurements(tmp_path / "b.h5", [ct(), mr()])
    with h5py.File(tmp_path / "b.h5") as f:
        assert sorted(f) == ["scan_0000", "scan_0001"] and f["scan_0001/noise/sigma_y"][()] == 1 / 3


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("y", "/y is missing"),
        ("operator", "/operator is missing"),
        ("geometry", "/geometry is missing"),
        ("geometry/affine", "/geometry/affine is missing"),
        ("geometry/spacing_mm", "/geometry/spacing_mm is missing"),
        ("noise", "/noise is missing"),
        ("noise/sqrt_w", "one of sigma_y and sqrt_w"),
        ("@schema", "its schema is None"),
        ("@unit", "lacks the attribute unit"),
        ("@simulated", "lacks the attribute simulated"),
        ("operator@kind", "/operator lacks the attribute kind"),
        ("operator@fields", "/operator lacks the attribute fields"),
        ("geometry@stored_axes", "/geometry lacks the attribute stored_axes"),
    ],
)
def test_missing_part(tmp_path, part, message):
    write_measurements(tmp_path / "a.h5", [ct()])
    with h5py.File(tmp_path / "a.h5", "a") as f:
        group, _, attribute = part.partition("@")
        if attribute:
            del f[group or "/"].attrs[attribute]
        else:
            del f[part]
    with pytest.raises(ValueError, match=message):
        read_measurements(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("y", np.full((3, 1, 5, 8), np.nan), "120 of 120 values of y are NaN"),
        ("y", np.zeros((3, 1, 5, 9)), r"sqrt_w of shape \(3, 1, 5, 8\) does not fit y of \(3, 1, 5, 9\)"),
        ("y", np.zeros(3), r"y has shape \(3,\)"),
        ("y", "text", "measurements"),
        ("noise/sqrt_w", -np.ones((5, 1)), "negative"),
        ("noise/sigma_y", 0.1, "not both"),
        ("geometry/affine", np.eye(3), r"\(4, 4\)"),
        ("geometry/affine", np.eye(4), "the affine says"),
        ("geometry/spacing_mm", np.ones(2), "spacing_mm"),
        ("@schema", "invdiff.measurements/2", "schema is 'invdiff.measurements/2'"),
        ("@mu_water", -1.0, "mu_water is -1.0"),
        ("operator@kind", "", "kind ''"),
        ("operator@fields", "{", "measurements"),
        ("operator@fields", "[1]", "a JSON object is wanted"),
        ("operator@fields", '{"pixel_mm": NaN}', "field pixel_mm holds nan"),
        ("geometry@stored_axes", [0, 0, 1], "permutation"),
        ("geometry@stored_flips", [0, 1], "booleans"),
    ],
)
def test_wrong_part(tmp_path, part, value, message):
    write_measurements(tmp_path / "a.h5", [ct()])
    with h5py.File(tmp_path / "a.h5", "a") as f:
        group, _, attribute = part.partition("@")
        if attribute:
            f[group or "/"].attrs[attribute] = value
        else:
            if part in f:
                del f[part]
            f[part] = value
    with pytest.raises(ValueError, match=message):
        read_measurements(tmp_path / "a.h5")


@pytest.mark.parametrize("keep", [0, 7, 500, 0.5, 0.95])
def test_truncated(tmp_path, keep):
    write_measurements(tmp_path / "a.h5", [ct(), mr()])
    content = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match="not a whole file of measurements"):
        read_measurements(tmp_path / "a.h5")


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        read_measurements(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="a folder"):
        read_measurements(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sqrt_w": None}, "one of sigma_y and sqrt_w"),
        ({"sqrt_w": None, "sigma_y": -0.1}, "sigma_y is -0.1"),
        ({"sqrt_w": None, "sigma_y": float("nan")}, "sigma_y is nan"),
        ({"sqrt_w": torch.ones(2, 1, 5, 8)}, "does not fit"),
        ({"sqrt_w": torch.ones(1, 3, 1, 5, 8)}, "does not fit"),
        ({"sqrt_w": torch.ones(5, 8, dtype=torch.complex64)}, "complex"),
        ({"mu_water": 0.0}, "mu_water is 0.0"),
        ({"unit": ""}, "unit ''"),
        ({"fields": {"a/b": 1}}, "'a/b' is not the name"),
        ({"fields": {"a": {"b": 1}}}, "field a holds dict"),
        ({"fields": {"a": np.float64(1)}}, "field a holds float64"),
        ({"fields": {"a": (torch.ones(2),)}}, "stack them"),
        ({"fields": {"a": torch.tensor(torch.inf)}}, "infinite"),
        ({"affine": np.zeros((4, 4))}, "last row"),
    ],
)
def test_constructor_says_no(change, message):
    with pytest.raises(ValueError, match=message):
        replace(ct(), **change)


def test_nothing_half_written(tmp_path):
    write_measurements(tmp_path / "a.h5", [ct()])
    before = (tmp_path / "a.h5").read_bytes()
    bad = replace(mr(), y=mr().y.real.bfloat16())
    with pytest.raises(ValueError, match="bfloat16, which HDF5 does not hold"):
        write_measurements(tmp_path / "a.h5", [ct(), bad])
    with pytest.raises(ValueError, match="at least one"):
        write_measurements(tmp_path / "b.h5", [])
    with pytest.raises(ValueError, match="is not there"):
        write_measurements(tmp_path / "none" / "a.h5", [ct()])
    assert [p.name for p in Path(tmp_path).iterdir()] == ["a.h5"] and (tmp_path / "a.h5").read_bytes() == before
