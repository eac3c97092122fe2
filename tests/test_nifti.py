"""NIfTI: every axis order keeps every voxel's place, and what is no scan gets one sentence."""

from __future__ import annotations

import gzip
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from invdiff.datasets import Volume, read_nifti, read_volume, write_nifti

VAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "val"
ORDERS = [(p, f) for p in permutations(range(3)) for f in product((1, -1), repeat=3)]
SIZES = (5, 6, 7)  # x y z


def rotation(a: float, b: float, c: float) -> np.ndarray:
    """Rotations by a, b, c radians about z, y, x."""
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
    return z @ y @ x


def oblique() -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = rotation(0.3, -0.2, 0.25) @ np.diag([0.7, 1.1, 2.5])
    affine[:3, 3] = (-91.3, 44.7, 301.2)
    return affine


def stored_as(array: np.ndarray, affine: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]):
    """The same voxels in the same places, in another axis order."""
    image = nibabel.Nifti1Image(array, affine)
    ornt = np.array([[order[a], signs[a]] for a in range(3)], dtype=float)
    return image.as_reoriented(ornt)


def phantom() -> np.ndarray:
    return np.random.default_rng(3).permutation(np.prod(SIZES)).reshape(SIZES).astype(np.float32)


@pytest.mark.parametrize(("order", "signs"), ORDERS)
def test_48_orders_keep_world_coordinates(tmp_path, order, signs):
    array, affine = phantom(), oblique()
    image = stored_as(array, affine, order, signs)
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_nifti(tmp_path / "in.nii", unit="HU")
    landmark = np.unravel_index(array.argmax(), SIZES)
    world = affine[:3, :3] @ landmark + affine[:3, 3]

    # in memory: columns to the left, rows to the back, slices up; one tensor for all 48
    x, y, z = landmark
    assert volume.data.shape == (7, 1, 6, 5)
    assert volume.data[z, 0, 5 - y, 4 - x] == array.max()
    assert torch.equal(volume.data[:, 0], torch.from_numpy(array[::-1, ::-1].transpose(2, 1, 0).copy()))
    assert np.abs(volume.affine @ (4 - x, 5 - y, z, 1) - (*world, 1)).max() < 1e-4
    assert np.allclose(volume.spacing_mm, (2.5, 1.1, 0.7), atol=1e-5)

    # a reconstruction that changes nothing but the values, then plain nibabel
    write_nifti(tmp_path / "out.nii.gz", replace(volume, data=2 * volume.data + 1))
    back = nibabel.load(tmp_path / "out.nii.gz")
    assert back.shape == image.shape and back.get_data_dtype() == np.float32
    assert np.array_equal(np.asarray(back.dataobj), 2 * np.asarray(image.dataobj) + 1)
    found = np.unravel_index(np.asarray(back.dataobj).argmax(), back.shape)
    for written in (back.get_sform(), back.get_qform()):
        assert np.abs(written @ (*found, 1) - (*world, 1)).max() < 1e-3
    assert back.header.get_xyzt_units()[0] == "mm" and back.header["sform_code"] == back.header["qform_code"] == 1


@pytest.mark.parametrize("seed", range(8))
def test_any_rotation_and_shear_comes_back(tmp_path, seed):
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    shear = np.eye(3) + (0.1 * np.triu(rng.normal(size=(3, 3)), 1) if seed % 2 else 0)
    affine[:3, :3] = rotation(*rng.uniform(-np.pi, np.pi, 3)) @ np.diag([0.5, 0.8, 3]) @ shear
    affine[:3, 3] = rng.normal(size=3) * 200
    nibabel.save(nibabel.Nifti1Image(phantom(), affine), tmp_path / "in.nii.gz")
    volume = read_nifti(tmp_path / "in.nii.gz", unit="a.u.")
    write_nifti(tmp_path / "out.nii.gz", volume)
    back = nibabel.load(tmp_path / "out.nii.gz")
    corners = np.array([(*c, 1) for c in product((0, 4), (0, 5), (0, 6))]).T
    assert np.abs((back.affine - affine) @ corners).max() < 1e-3
    assert np.array_equal(np.asarray(back.dataobj), phantom())
    qform = back.get_qform(coded=True)[0]
    assert qform is None or np.abs((qform - affine) @ corners).max() < 0.02
    assert (qform is None) == bool(seed % 2)  # qform cannot hold shear, so none is claimed


def test_left_posterior_superior_landmark(tmp_path):
    array = np.zeros((9, 10, 11), dtype=np.int16)
    array[1, 2, 9] = 500  # stored R to L? affine says index 0 is the patient's left
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1, 1, 1])), tmp_path / "ras.nii")
    volume = read_nifti(tmp_path / "ras.nii")
    s, _, h, w = (int(v) for v in torch.nonzero(volume.data)[0])
    assert (s, h, w) == (9, 7, 7)  # superior; posterior is down; the patient's left is at the right


def test_four_axes_are_channels(tmp_path):
    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    volume = read_volume(path)
    image = nibabel.load(path)
    array = np.asarray(image.dataobj)
    assert volume.data.shape == (24, 2, 96, 128) and volume.unit == "a.u."
    flat = [np.sort(array[..., c].ravel()) for c in range(2)]
    assert all(np.array_equal(np.sort(volume.data[:, c].numpy().ravel()), flat[c]) for c in range(2))
    assert np.array_equal(volume.data[3, 1].numpy(), array[:, ::-1, 3, 1].T)
    write_nifti(tmp_path / "out.nii", volume)
    back = nibabel.load(tmp_path / "out.nii")
    assert np.array_equal(np.asarray(back.dataobj), array) and np.abs(back.affine - image.affine).max() < 1e-4


def test_scale_units_and_type(tmp_path):
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    image = nibabel.Nifti1Image(array, np.diag([-0.002, -0.003, 0.004, 1]))
    image.header.set_slope_inter(0.5, -7)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "in.nii")
    volume = read_nifti(tmp_path / "in.nii")
    assert np.allclose(volume.spacing_mm, (4, 3, 2))
    assert np.array_equal(volume.data[:, 0].numpy(), 0.5 * array.transpose(2, 1, 0) - 7)


@pytest.mark.parametrize(("low", "unit"), [(-1000, "HU"), (0, "a.u.")])
def test_unit_is_guessed_then_kept(tmp_path, low, unit):
    array = np.linspace(low, 800, 120, dtype=np.float32).reshape(4, 5, 6)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "in.nii")
    volume = read_nifti(tmp_path / "in.nii")
    assert volume.unit == unit
    write_nifti(tmp_path / "out.nii.gz", replace(volume, data=volume.data.clamp_min(0)))
    assert read_nifti(tmp_path / "out.nii.gz").unit == unit
    assert read_nifti(tmp_path / "out.nii.gz", unit="1/mm").unit == "1/mm"


def _good(path: Path) -> bytes:
    array = np.random.default_rng(0).normal(size=(20, 21, 22)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 10, 200, 400, 0.5, 0.98])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_truncated(tmp_path, name, keep):
    content = _good(tmp_path / name)
    (tmp_path / name).write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ValueError, match="not a whole NIfTI file"):
        read_volume(tmp_path / name)


def test_damaged_gzip(tmp_path):
    content = bytearray(_good(tmp_path / "a.nii.gz"))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole NIfTI file"):
        read_nifti(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("content", [b"this is a text, not a scan" * 40, gzip.compress(b"neither is this" * 90)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_not_a_scan(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a whole NIfTI file"):
        read_nifti(tmp_path / name)


def test_missing_and_folder(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        read_volume(tmp_path / "none.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(ValueError, match="a folder; a file is wanted"):
        read_nifti(tmp_path / "folder.nii")


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (np.full((3, 4, 5), np.nan, np.float32), np.eye(4), "60 of 60 voxels are NaN or infinite"),
        (np.full((3, 4, 5), 1e300), np.eye(4), "infinite"),
        (np.zeros((3, 4, 5), np.complex64), np.eye(4), "complex64"),
        (np.zeros((3, 4, 5, 2, 2), np.float32), np.eye(4), r"\(3, 4, 5, 2, 2\)"),
        (np.zeros((3, 4), np.float32), np.eye(4), r"\(3, 4\)"),
        (np.zeros((3, 4, 5), np.float32), np.diag([1.0, 0, 1, 1]), "plane"),
    ],
)
def test_unusable_content(tmp_path, array, affine, message):
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=message):
        read_nifti(tmp_path / "a.nii")


def test_nothing_half_written(tmp_path, monkeypatch):
    volume = Volume(torch.rand(3, 1, 4, 5), np.diag([-1.0, -1, 1, 1]), "HU")
    write_nifti(tmp_path / "a.nii", volume)
    before = (tmp_path / "a.nii").read_bytes()

    def full(image, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full)
    with pytest.raises(ValueError, match="No space left"):
        write_nifti(tmp_path / "a.nii", volume)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"] and (tmp_path / "a.nii").read_bytes() == before


def test_where_it_cannot_be_written(tmp_path):
    volume = Volume(torch.rand(3, 1, 4, 5), np.diag([-1.0, -1, 1, 1]), "HU")
    with pytest.raises(ValueError, match="does not end in"):
        write_nifti(tmp_path / "a.png", volume)
    with pytest.raises(ValueError, match="is not there"):
        write_nifti(tmp_path / "none" / "a.nii", volume)
    (tmp_path / "b.nii").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_nifti(tmp_path / "b.nii", volume)


@pytest.mark.parametrize(
    "name", ["ct/totalsegmentator_example_ct.nii.gz", "mr/ljubljana_ms_patient01/study1_FLAIR.nii.gz"]
)
def test_real_scans(tmp_path, name):
    if not (VAL / name).is_file():
        pytest.skip(f"{name} is not at hand")
    volume = read_volume(VAL / name)
    write_nifti(tmp_path / "out.nii.gz", volume)
    a, b = nibabel.load(VAL / name), nibabel.load(tmp_path / "out.nii.gz")
    assert np.abs(a.affine - b.affine).max() < 1e-4 and a.shape == b.shape
    assert np.array_equal(np.asarray(a.dataobj).astype(np.float32), np.asarray(b.dataobj))
    assert volume.unit == ("HU" if name.startswith("ct") else "a.u.")
