"""DICOM in and out: places, HU, identity of the patient, and one sentence for what is no series."""

from __future__ import annotations

import shutil
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pydicom.data
import pytest
import torch

from invdiff.datasets import Storage, Volume, read_dicom, read_nifti, read_volume, write_dicom, write_nifti
from invdiff.datasets.dicom_write import CT_IMAGE

VAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "val"
SERIES = ["ct/LungFCP-01-0001", "ct/C3L-00189", "ct/totalsegmentator_dicom_j2k", "mr/VS-SEG-001_T1c_dicom"]
STUDY = pydicom.uid.generate_uid()
FRAME = pydicom.uid.generate_uid()
KNOWN = {"PatientName": "Käse^Ägidius", "PatientID": "p7", "StudyInstanceUID": STUDY, "FrameOfReferenceUID": FRAME}
LPS = np.diag([-1.0, -1, 1, 1])
OBLIQUE = np.array(
    [[-0.75, 0.11, 0.3, 61.0], [-0.1, -0.8, 0.55, -12.5], [0.12, 0.2, 2.4, 17.0], [0, 0, 0, 1]]
)  # made orthogonal below


def orthogonal(affine: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(affine[:3, :3] / lengths)
    result = affine.copy()
    result[:3, :3] = u @ v * lengths
    return result


def field(places: np.ndarray) -> np.ndarray:
    """HU of places (3, ...) in RAS mm."""
    return 3 * places[0] + 5 * places[1] - 2 * places[2] + 10


def field_of(affine: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    s, h, w = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    places = np.einsum("ij,j...->i...", affine, np.stack([w, h, s, np.ones_like(w)]).astype(float))
    return torch.from_numpy(field(places)).float()[:, None]


def make(affine: np.ndarray = OBLIQUE, shape: tuple[int, int, int] = (5, 6, 7), storage: Storage | None = None):
    affine = orthogonal(affine)
    source = {"dicom": dict(KNOWN)} if storage else {}
    return Volume(field_of(affine, shape), affine, "HU", storage or Storage(), source)


def series(folder: Path) -> list[Path]:
    write_dicom(folder, make())
    return sorted(folder.iterdir())


def tamper(path: Path, **values: object) -> None:  # a test's helper, not a public signature
    dataset = pydicom.dcmread(path)
    for key, value in values.items():
        if value is None:
            del dataset[key]
        else:
            setattr(dataset, key, value)
    dataset.save_as(path)


def wheel_file(name: str) -> Path:
    path = pydicom.data.get_testdata_file(name, download=False)
    assert path is not None
    assert Path(path).is_relative_to(Path(pydicom.__file__).parent)
    return Path(path)


@pytest.mark.parametrize(
    "storage", [Storage(p, f) for p in permutations(range(3)) for f in product((False, True), repeat=3)]
)
def test_48_orders_keep_world_coordinates(tmp_path, storage):
    """Axial, sagittal and coronal slices, all oblique, every direction: pydicom's pixels lie where its header says."""
    volume = make(storage=storage)
    write_dicom(tmp_path / "out", volume)
    for path in (tmp_path / "out").iterdir():
        d = pydicom.dcmread(path)
        i, j = np.meshgrid(np.arange(d.Columns), np.arange(d.Rows))
        row, column = np.array(d.ImageOrientationPatient, float).reshape(2, 3)
        place = np.array(d.ImagePositionPatient, float)[:, None, None]
        place = place + row[:, None, None] * i * d.PixelSpacing[1] + column[:, None, None] * j * d.PixelSpacing[0]
        hu = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
        assert np.abs(hu - field(place * np.array([-1, -1, 1])[:, None, None])).max() < 0.501
    back = read_dicom(tmp_path / "out")
    assert back.data.shape == volume.data.shape and np.abs(back.affine - volume.affine).max() < 1e-6
    assert torch.equal(back.data, volume.data.double().round().float())
    assert back.storage.axes == storage.axes


def test_dicom_to_nifti_and_back(tmp_path):
    volume = make(storage=Storage((1, 2, 0), (False, True, True)))
    write_dicom(tmp_path / "a", volume)
    read = read_dicom(tmp_path / "a")
    write_nifti(tmp_path / "a.nii.gz", read)
    image = nibabel.load(tmp_path / "a.nii.gz")
    index = np.indices(image.shape).reshape(3, -1)
    places = image.affine[:3, :3] @ index + image.affine[:3, 3:]
    assert np.abs(np.asarray(image.dataobj).ravel() - field(places)).max() < 0.51
    again = read_nifti(tmp_path / "a.nii.gz")
    assert torch.equal(again.data, read.data) and np.abs(again.affine - read.affine).max() < 1e-4
    write_dicom(tmp_path / "b", again)  # a source that was no DICOM: axial slices as on a screen
    assert torch.equal(read_dicom(tmp_path / "b").data, read.data)
    first = pydicom.dcmread(tmp_path / "b" / "0001.dcm")
    assert np.array(first.ImageOrientationPatient)[[0, 4]].min() > 0.9


def test_derived_series(tmp_path):
    volume = make(storage=Storage((0, 1, 2), (False, False, True)))
    write_dicom(tmp_path / "a", volume, "DDS")
    write_dicom(tmp_path / "b", volume, "DDS")
    a, b = ([pydicom.dcmread(f) for f in sorted((tmp_path / n).iterdir())] for n in "ab")
    for d in a:
        assert list(d.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert str(d.PatientName) == KNOWN["PatientName"] and d.PatientID == "p7"
        assert d.StudyInstanceUID == STUDY and d.FrameOfReferenceUID == FRAME
        assert d.DerivationDescription.startswith("invdiff") and "DDS" in d.DerivationDescription
        assert d.ImageComments == "NOT FOR DIAGNOSTIC USE"
        assert d.SOPClassUID == d.file_meta.MediaStorageSOPClassUID == CT_IMAGE
        assert d.SOPInstanceUID == d.file_meta.MediaStorageSOPInstanceUID
    assert len({d.SeriesInstanceUID for d in a}) == 1
    assert len({d.SeriesInstanceUID for d in a + b}) == 2
    assert len({d.SOPInstanceUID for d in a + b}) == len(a + b)


def test_values_beyond_the_usual(tmp_path):
    data = torch.linspace(-2500.4, 9000.0, 210).reshape(5, 1, 6, 7)
    write_dicom(tmp_path / "hu", Volume(data, orthogonal(OBLIQUE), "HU"))
    assert (read_dicom(tmp_path / "hu").data - data).abs().max() <= 0.501
    mr = Volume(data * 1e-3, orthogonal(OBLIQUE), "a.u.")
    write_dicom(tmp_path / "mr", mr)
    back = read_dicom(tmp_path / "mr")
    assert back.unit == "a.u." and (back.data - mr.data).abs().max() < 11.6 / 65535
    flat = Volume(torch.full((2, 1, 3, 4), 7.25), orthogonal(OBLIQUE), "a.u.")
    write_dicom(tmp_path / "flat", flat)
    assert torch.equal(read_dicom(tmp_path / "flat").data, flat.data)


def test_tilted_gantry_keeps_its_shear(tmp_path):
    for k, path in enumerate(series(tmp_path / "a")):
        d = pydicom.dcmread(path)
        x, y, z = d.ImagePositionPatient
        tamper(path, ImagePositionPatient=[x, float(y) + 0.6 * k, z])
    volume = read_dicom(tmp_path / "a")
    expected = orthogonal(OBLIQUE)
    expected[1, 2] -= 0.6  # LPS y is RAS -y
    assert np.abs(volume.affine - expected).max() < 1e-6
    write_dicom(tmp_path / "b", volume)
    assert np.abs(read_dicom(tmp_path / "b").affine - expected).max() < 1e-6


def test_files_are_sorted_by_position_not_name(tmp_path):
    files = series(tmp_path / "a")
    before = read_dicom(tmp_path / "a")
    for name, path in zip("dbace", files, strict=True):
        path.rename(path.with_name(f"{name}.dcm"))
    (tmp_path / "a" / "LICENSE").write_text("not a scan, and not called one")
    after = read_dicom(tmp_path / "a")
    assert torch.equal(before.data, after.data) and np.array_equal(before.affine, after.affine)
    assert before.source["sha256"] == after.source["sha256"]


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")
def test_ct_of_pydicom(name):
    volume = read_volume(wheel_file(name))
    d = pydicom.dcmread(wheel_file(name))
    hu = d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept)
    assert volume.unit == "HU" and np.array_equal(volume.data[0, 0].numpy(), hu)
    place = LPS @ volume.affine @ (0, 0, 0, 1)
    assert np.abs(place[:3] - np.array(d.ImagePositionPatient, float)).max() < 1e-6
    assert volume.spacing_mm[1:] == pytest.approx([float(v) for v in d.PixelSpacing])
    assert volume.spacing_mm[0] == pytest.approx(float(d.SliceThickness))


def test_compressed_as_uncompressed():
    plain = read_dicom(wheel_file("MR_small.dcm"))
    assert plain.unit == "a.u."
    for name in ("MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"):
        assert torch.equal(read_dicom(wheel_file(name)).data, plain.data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MR_truncated.dcm", "bytes of pixel data is less than expected"),
        ("examples_rgb_color.dcm", "colour"),
        ("examples_palette.dcm", "colour"),
        ("rtdose.dcm", "15 frames"),
        ("JPEG2000.dcm", "no ImagePositionPatient"),
        ("reportsi.dcm", "without an image"),
        ("rtplan_truncated.dcm", "DICOM file"),
    ],
)
def test_files_that_are_no_slice(name, message):
    with pytest.raises(ValueError, match=message):
        read_dicom(wheel_file(name))


def test_two_series(tmp_path):
    series(tmp_path / "a")
    for path in series(tmp_path / "b")[:2]:
        shutil.copy(path, tmp_path / "a" / f"other_{path.name}")
    uids = {pydicom.dcmread(f).SeriesInstanceUID for f in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match=r"2 series.*\(\d files\)") as error:
        read_volume(tmp_path / "a")
    assert all(uid in str(error.value) for uid in uids)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_missing_slice(tmp_path, k):
    series(tmp_path / "a")[k].unlink()
    with pytest.raises(ValueError, match=r"missing or uneven slices: .* mm between"):
        read_volume(tmp_path / "a")


def test_twice_the_same_place(tmp_path):
    files = series(tmp_path / "a")
    shutil.copy(files[1], tmp_path / "a" / "copy.dcm")
    with pytest.raises(ValueError, match="two slices at"):
        read_volume(tmp_path / "a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"Rows": 5}, "2 sizes: 5 x 7, 6 x 7"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "mixes slices of orientation"),
        ({"PixelSpacing": [0.5, 0.5]}, "mixes slices of spacing"),
        ({"ImagePositionPatient": None}, "no ImagePositionPatient"),
        ({"RescaleSlope": None}, "without RescaleSlope"),
        ({"RescaleSlope": "1e30", "RescaleIntercept": "1e300"}, "infinite"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"NumberOfFrames": 2}, "2 frames"),
        ({"Rows": None}, "without an image"),
        ({"PixelData": None}, "pixels of .* cannot be read"),
    ],
)
def test_one_file_that_does_not_fit(tmp_path, values, message):
    tamper(series(tmp_path / "a")[2], **values)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "a")


def test_skewed_orientation(tmp_path):
    for path in series(tmp_path / "a"):
        tamper(path, ImageOrientationPatient=[1, 0, 0, 0.3, 0.9, 0])
    with pytest.raises(ValueError, match="right angle"):
        read_dicom(tmp_path / "a")


@pytest.mark.parametrize("keep", [0, 100, 140, 300, 700, 0.95])
def test_truncated_file(tmp_path, keep):
    path = series(tmp_path / "a")[4]
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(ValueError, match=r"0005\.dcm"):
        read_dicom(tmp_path / "a")


def test_every_file_of_pydicom_is_a_scan_or_one_sentence():
    read, refused = 0, 0
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm")):
        try:
            read += read_volume(path).data.shape[0]
        except ValueError as error:
            refused += "\n" not in str(error)
    assert read >= 10 and refused >= 40


@pytest.mark.parametrize("seed", range(40))
def test_damaged_header(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(wheel_file("CT_small.dcm").read_bytes())
    for at in rng.integers(132, 6000, 1 + seed % 7):
        content[at] = rng.integers(256)
    (tmp_path / "a.dcm").write_bytes(content)
    try:
        assert torch.isfinite(read_dicom(tmp_path / "a.dcm").data).all()
    except ValueError as error:
        assert "a.dcm" in str(error)


def test_no_scan(tmp_path):
    with pytest.raises(ValueError, match="holds no DICOM image"):
        read_volume(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="holds no DICOM image"):
        read_volume(tmp_path)
    with pytest.raises(ValueError, match="not a scan"):
        read_volume(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="not there"):
        read_volume(tmp_path / "none")
    (tmp_path / "a.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="measurements"):
        read_volume(tmp_path / "a.h5")
    (tmp_path / "b.dcm").write_text("text")
    with pytest.raises(ValueError, match="not a DICOM file"):
        read_dicom(tmp_path)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (Volume(torch.zeros(2, 2, 3, 4), LPS, "HU"), "2 channels"),
        (Volume(torch.zeros(2, 1, 3, 4), LPS, "1/mm"), "1/mm"),
        (Volume(torch.tensor([-3e4, 4e4]).reshape(2, 1, 1, 1), LPS, "HU"), "do not fit 16 bits"),
        (Volume(torch.zeros(2, 1, 3, 4), LPS + 0.2 * np.eye(4, k=1), "HU"), "right angle"),
    ],
)
def test_what_dicom_cannot_hold(tmp_path, volume, message):
    with pytest.raises(ValueError, match=message):
        write_dicom(tmp_path / "out", volume)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path, monkeypatch):
    volume = make()
    with pytest.raises(ValueError, match="is not there"):
        write_dicom(tmp_path / "none" / "out", volume)
    save = pydicom.dataset.Dataset.save_as

    def full(self, path, **options):
        if Path(path).name == "0003.dcm":
            raise OSError(28, "No space left on device")
        save(self, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pydicom.dataset.Dataset, "save_as", full)
        with pytest.raises(ValueError, match="No space left"):
            write_dicom(tmp_path / "out", volume)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    write_dicom(tmp_path / "out", volume)  # an empty folder is taken
    with pytest.raises(ValueError, match="exists already"):
        write_dicom(tmp_path / "out", volume)
    assert len(list((tmp_path / "out").iterdir())) == 5 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", SERIES)
def test_real_series(tmp_path, name):
    if not (VAL / name).is_dir():
        pytest.skip(f"{name} is not at hand")
    volume = read_volume(VAL / name)
    for path in list((VAL / name).iterdir())[::9]:
        d = pydicom.dcmread(path)
        w, h, s = (np.linalg.inv(LPS @ volume.affine) @ (*map(float, d.ImagePositionPatient), 1))[:3]
        assert abs(w) < 1e-2 and abs(h) < 1e-2 and abs(s - round(s)) < 1e-2
        values = d.pixel_array * float(d.get("RescaleSlope", 1)) + float(d.get("RescaleIntercept", 0))
        assert np.array_equal(volume.data[round(s), 0].numpy(), values)
    write_dicom(tmp_path / "out", volume)
    back = read_dicom(tmp_path / "out")
    assert back.unit == volume.unit and np.abs(back.affine - volume.affine).max() < 1e-6
    assert (back.data - volume.data).abs().max() <= (
        0 if volume.unit == "HU" else float(volume.data.max() - volume.data.min()) / 65535
    )
    new, old = (pydicom.dcmread(next(p.glob("*.dcm")), stop_before_pixels=True) for p in (tmp_path / "out", VAL / name))
    assert new.get("SeriesInstanceUID") != old.get("SeriesInstanceUID")
    for key in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert not old.get(key) or new.get(key) == old.get(key)
