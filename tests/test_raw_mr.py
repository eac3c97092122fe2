"""Raw MR data: every format against points whose place is known, real twix files, and one sentence for what is none."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from invdiff.datasets import (
    KSpace,
    read_bart,
    read_calgary_campinas,
    read_fastmri,
    read_fastmri_target,
    read_ismrmrd,
    read_kspace,
    read_twix,
    upright,
    without_oversampling,
    write_bart,
    write_ismrmrd,
)
from invdiff.datasets.bart import read_cfl, write_cfl
from invdiff.datasets.kspace import exchanged
from invdiff.fourier import centred_fft, centred_ifft

RAW = Path(__file__).resolve().parents[2] / "shared" / "data" / "val" / "raw_mr"
PHANTOMS = ("pulseq_gre_phantom_16ch.dat", "pulseq_se_phantom_32ch.dat", "twixtools_gre_phantom_2ch.dat")
LPS = np.diag([-1.0, -1.0, 1.0])


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def frame_of(turn=(0.2, -0.1, 0.4)):
    """A rotated frame: read, phase and slice directions (LPS) as columns."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_euler("xyz", turn).as_matrix()


def image_of(kspace):
    return centred_ifft(kspace.data)


def brightest(kspace):
    """LPS mm of the brightest voxel."""
    image = image_of(kspace).abs().square().sum(1)
    s, h, w = np.unravel_index(int(image.argmax()), image.shape)
    return LPS @ (kspace.affine @ [w, h, s, 1])[:3]


# ---------------------------------------------------------------- ISMRMRD


def header(encoded, fov, recon, recon_fov, centres=(0, 0), last=0, trajectory="cartesian", vendor="ACME"):
    space = "".join(
        f"<{tag}><matrixSize><x>{n[0]}</x><y>{n[1]}</y><z>{n[2]}</z></matrixSize>"
        f"<fieldOfView_mm><x>{mm[0]}</x><y>{mm[1]}</y><z>{mm[2]}</z></fieldOfView_mm></{tag}>"
        for tag, n, mm in (("encodedSpace", encoded, fov), ("reconSpace", recon, recon_fov))
    )
    limits = "".join(
        f"<kspace_encoding_step_{n + 1}><minimum>0</minimum><maximum>{last}</maximum><center>{centres[n]}</center>"
        f"</kspace_encoding_step_{n + 1}>"
        for n in range(2)
    )
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><acquisitionSystemInformation>'
        f"<systemVendor>{vendor}</systemVendor></acquisitionSystemInformation><experimentalConditions>"
        "<H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions><encoding>"
        f"{space}<encodingLimits>{limits}</encodingLimits><trajectory>{trajectory}</trajectory></encoding>"
        "<sequenceParameters><TR>8.6</TR></sequenceParameters></ismrmrdHeader>"
    )


def write_with_package(path, xml, readouts):
    """Through the package of the format's authors: (samples (coil n), trajectory or None, header fields, flags)."""
    import ismrmrd

    with ismrmrd.Dataset(str(path), "dataset") as file:
        file.write_xml_header(xml.encode())
        for samples, track, fields, flags in readouts:
            acq = ismrmrd.Acquisition.from_array(np.asarray(samples, np.complex64), trajectory=track)
            for key, value in fields.items():
                owner = acq.idx if hasattr(acq.idx, key) else acq
                if isinstance(value, list | tuple | np.ndarray):
                    getattr(owner, key)[:] = [float(v) for v in value]
                else:
                    setattr(owner, key, value)
            for flag in flags:
                acq.set_flag(flag)
            file.append_acquisition(acq)


def signal(k, at):
    """What a point at ``at`` (mm from the centre, in the frame of ``k``) gives at k (1/mm)."""
    return np.exp(-2j * np.pi * np.asarray(k) @ np.asarray(at))


def directions(frame):
    return {"read_dir": frame[:, 0], "phase_dir": frame[:, 1], "slice_dir": frame[:, 2]}


def cartesian_readouts(frame, x=16, y=9, mm=(2.0, 3.0, 5.0)):
    """Two slices, out of order, a point in slice 1; oversampling, a partial echo, averages, discarded samples."""
    at = (6.0, -9.0)
    kx, ky = (np.arange(x) - x // 2) / (x * mm[0]), np.arange(y) - y // 2
    readouts = []
    for s in (1, 0):
        for line in range(y):
            k = np.stack([kx, np.full(x, ky[line] / (y * mm[1]))], axis=1)
            values = np.stack([c * signal(k, at) for c in (1.0, 2.0j)]) * (1.0 if s else 0.01)
            fields = {
                **directions(frame),
                "position": frame @ [4.0, 5.0, -7.0 + 5.0 * s],
                "kspace_encode_step_1": line,
                "slice": s,
                "center_sample": x // 2,
            }
            if line == 1:  # a partial echo, with one useless sample at each end
                values = np.pad(values[:, 3:], ((0, 0), (1, 1)), constant_values=77)
                fields |= {"center_sample": x // 2 - 3 + 1, "discard_pre": 1, "discard_post": 1}
            if line == 4:  # two averages
                readouts.append((values * 1.5, None, {**fields, "average": 1}, []))
                values = values * 0.5
            if line == 5:  # stored backwards
                values, fields = values[:, ::-1], {**fields, "center_sample": x - 1 - x // 2}
                readouts.append((values, None, fields, [22]))
            elif line != 7:  # and one line was not measured
                readouts.append((values, None, fields, []))
    return readouts, frame @ [4.0 + at[0], 5.0 + at[1], -2.0]


@pytest.mark.parametrize("vendor", ["ACME", "SIEMENS"])
def test_ismrmrd_of_its_authors_package(tmp_path, vendor):
    pytest.importorskip("ismrmrd")
    frame = frame_of()
    readouts, where = cartesian_readouts(frame)
    noise, other = draw(2, 31, seed=4).numpy(), draw(2, 5, seed=5).numpy()
    acs = [
        (draw(2, 6, seed=s).numpy(), None, {"slice": s, "kspace_encode_step_1": 4, "center_sample": 3}, [20])
        for s in (0, 1)
    ]
    extra = [(noise, None, {}, [19]), (noise * 2, None, {}, [19]), (other, None, {"kspace_encode_step_1": 2}, [23])]
    xml = header((16, 9, 1), (32, 27, 5), (8, 9, 1), (16, 27, 5), (4, 0), 8, vendor=vendor)
    write_with_package(tmp_path / "a.h5", xml, [*extra, *acs, *readouts])
    scan = read_ismrmrd(tmp_path / "a.h5")
    assert scan.data.shape == (2, 2, 9, 16) and scan.crop == (9, 8)
    assert scan.spacing_mm == pytest.approx((5.0, 3.0, 2.0))
    assert scan.source["tr_ms"] == 8.6 and scan.source["averages"] == 2 and scan.source["frames"] == 1
    missing = ~scan.mask
    assert missing[7].all() and missing[1, :3].all() and int(missing.sum()) == 16 + 3
    assert torch.equal(scan.noise, torch.from_numpy(np.concatenate([noise, noise * 2], axis=1)))
    assert scan.calibration.shape == (2, 2, 1, 6)
    assert np.allclose(scan.calibration[1, :, 0].numpy(), draw(2, 6, seed=1).numpy())
    centre, turned = frame @ [4.0, 5.0, -2.0], np.asarray(where)
    if vendor == "SIEMENS":  # its data run against the directions: half a turn about the slice's centre
        turned = 2 * centre - turned
    assert np.allclose(brightest(scan), turned, atol=1e-4)
    again = read_kspace(tmp_path / "a.h5")
    assert np.allclose(brightest(again), turned, atol=1e-4)
    assert torch.equal(again.data, upright(scan).data)
    full = scan.data[1, 0, 2:7]
    assert float((full.abs() - 1).abs().max()) < 1e-6  # the mean of the averages, the reversed line forward


def test_ismrmrd_of_a_slab(tmp_path):
    """3D: slices along the readout, rows lines, columns partitions; not all of them measured."""
    pytest.importorskip("ismrmrd")
    frame = frame_of((-0.3, 0.2, 0.1))
    x, y, z, mm, at = 12, 7, 5, (2.0, 3.0, 4.0), (-4.0, 6.0, 8.0)
    readouts = []
    for j in range(y):
        for k in range(z):
            if (j + k) % 4 == 3:
                continue
            where = np.stack(
                [
                    (np.arange(x) - x // 2) / (x * mm[0]),
                    np.full(x, (j - 3) / (y * mm[1])),
                    np.full(x, (k - 2) / (z * mm[2])),
                ],
                1,
            )
            fields = {**directions(frame), "position": frame @ [1.0, 2.0, 3.0], "center_sample": x // 2}
            fields |= {"kspace_encode_step_1": j, "kspace_encode_step_2": k}
            readouts.append((signal(where, at)[None], None, fields, []))
    xml = header((x, y, z), (24, 21, 20), (6, y, z), (12, 21, 20), (3, 2), 6)
    write_with_package(tmp_path / "a.h5", xml, readouts)
    scan = read_ismrmrd(tmp_path / "a.h5")
    assert scan.data.shape == (6, 1, 7, 5) and scan.spacing_mm == pytest.approx((2.0, 3.0, 4.0))
    assert int(scan.mask.sum()) == len(readouts) and bool((scan.data[..., ~scan.mask] == 0).all())
    assert np.allclose(brightest(scan), frame @ [1.0 - 4.0, 2.0 + 6.0, 3.0 + 8.0], atol=1e-4)


@pytest.mark.parametrize("unit", [1.0, 10.0])  # cycles per pixel, and per field of view of 10 pixels
def test_ismrmrd_off_the_grid(tmp_path, unit):
    pytest.importorskip("ismrmrd")
    frame, at, mm = frame_of(), np.array([-4.0, 2.0]), 2.0
    g = np.random.default_rng(1)
    spokes = [np.outer(np.arange(-10, 10) / 20, [np.cos(a), np.sin(a)]) for a in g.uniform(0, np.pi, 30)]
    readouts = [
        (
            signal(p / mm, at)[None],
            (p * unit).astype(np.float32),
            {**directions(frame), "position": (3.0, 2.0, 1.0)},
            [],
        )
        for p in spokes
    ]
    xml = header((10, 10, 1), (20, 20, 6), (10, 10, 1), (20, 20, 6), trajectory="radial")
    write_with_package(tmp_path / "a.h5", xml, readouts)
    for scan in (read_ismrmrd(tmp_path / "a.h5"), read_kspace(tmp_path / "a.h5")):
        assert scan.shape == (10, 10) and scan.mask is None and scan.data.shape == (1, 1, 600)
        grid = torch.stack(torch.meshgrid(torch.arange(10) - 5.0, torch.arange(10) - 5.0, indexing="ij"), -1).reshape(
            -1, 2
        )
        image = torch.exp(2j * torch.pi * (grid @ scan.trajectory.T)) @ scan.data[0, 0]
        h, w = divmod(int(image.abs().argmax()), 10)
        assert float(image.abs().max()) == pytest.approx(600, rel=1e-3)
        assert np.allclose(LPS @ (scan.affine @ [w, h, 0, 1])[:3], [3, 2, 1] + frame[:, :2] @ at, atol=1e-4)


@pytest.mark.parametrize(("h", "w"), [(7, 10), (8, 5)])
@pytest.mark.parametrize("sampled", ["rows", "columns"])
def test_ismrmrd_round_trip(tmp_path, h, w, sampled):
    pytest.importorskip("ismrmrd")
    affine = np.eye(4)
    affine[:3, :3] = frame_of((0.1, 0.2, 0.3)) * [1.1, -1.3, 2.5]
    affine[:3, 3] = (5, -20, 33)
    mask = torch.zeros(3, h, w, dtype=torch.bool)
    for s in range(3):
        if sampled == "rows":
            mask[s, s::2] = True
        else:
            mask[s, :, s::2] = True
    data = draw(3, 2, h, w) * mask[:, None]
    scan = KSpace(
        data, mask, affine, crop=(h, w - 2), noise=draw(2, 33), calibration=draw(3, 2, 5, 4),
        source={"name": "x", "tr_ms": 3.5, "field_T": 1.5, "patient_position": "HFS", "vendor": "SIEMENS"},
    )  # fmt: skip
    write_ismrmrd(tmp_path / "a.h5", scan)
    back = read_ismrmrd(tmp_path / "a.h5")
    wanted = scan if sampled == "rows" else exchanged(scan)
    for name in ("data", "mask", "noise", "calibration"):
        assert torch.equal(getattr(back, name), getattr(wanted, name)), name
    assert np.abs(back.affine - wanted.affine).max() < 1e-5 and back.crop == wanted.crop
    assert {k: back.source[k] for k in ("tr_ms", "field_T", "patient_position")} == {
        "tr_ms": 3.5, "field_T": 1.5, "patient_position": "HFS"}  # fmt: skip
    import ismrmrd

    with ismrmrd.Dataset(str(tmp_path / "a.h5"), mode="r") as file:  # the authors' package takes it too
        found = ismrmrd.xsd.CreateFromDocument(file.read_xml_header())
        assert found.encoding[0].encodedSpace.matrixSize.x == wanted.data.shape[3]
        assert file.read_acquisition(1).data.shape == (2, wanted.calibration.shape[3])


def test_ismrmrd_round_trip_off_the_grid(tmp_path):
    pytest.importorskip("ismrmrd")
    track = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    affine = np.diag([-2.0, -1.5, 4.0, 1.0])
    scan = KSpace(draw(2, 3, 50), None, affine, trajectory=track, shape=(9, 14), source={"name": "x"})
    write_ismrmrd(tmp_path / "a.h5", scan)
    back = read_ismrmrd(tmp_path / "a.h5")
    assert torch.equal(back.data, scan.data) and torch.equal(back.trajectory, track) and back.shape == (9, 14)
    assert np.abs(back.affine - affine).max() < 1e-5


def test_ismrmrd_says_no(tmp_path):
    pytest.importorskip("ismrmrd")
    path = tmp_path / "a.h5"
    scan = KSpace(draw(1, 2, 6, 8), torch.ones(6, 8, dtype=torch.bool), np.eye(4), source={"name": "x"})
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[2, 3] = False
    with pytest.raises(ValueError, match="gaps along rows and columns"):
        write_ismrmrd(path, KSpace(scan.data * mask, mask, np.eye(4)))
    assert not list(tmp_path.iterdir())
    write_ismrmrd(path, scan)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        read_ismrmrd(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="there is no frame 1"):
        read_ismrmrd(path, frame=1)
    with pytest.raises(ValueError, match=r"other/data and other/xml .* dataset \(data, xml\)"):
        read_ismrmrd(path, dataset="other")
    for change, message in (
        (lambda r: r["head"].__setitem__("flags", 1 << 23), "echo-planar"),
        (lambda r: r["head"].__setitem__("flags", 1 << 18), "none of its 6 readouts"),
        (lambda r: r["head"].__setitem__("active_channels", [2, 2, 2, 2, 2, 1]), "1 coils and 8 samples holds 32"),
        (lambda r: r["head"].__setitem__("discard_pre", 8), "discards 8 and 0"),
        (lambda r: r["head"].__setitem__("read_dir", 0), "unit vectors"),
        (lambda r: [v.__setitem__(slice(None), 0) for v in r["data"]], "zero throughout"),
        (lambda r: r["data"][3].__setitem__(0, np.nan), "NaN"),
        (lambda r: r["data"][3].__setitem__(slice(None), 0), "lines are missing"),
    ):
        path.write_bytes(content)
        with h5py.File(path, "r+") as file:
            records = file["dataset/data"][()]
            change(records)
            file["dataset/data"][...] = records
        with pytest.raises(ValueError, match=message) as caught:
            read_ismrmrd(path)
        assert str(caught.value).startswith("a.h5")
    for xml, message in (("<a>", "not XML"), ("<a/>", "no encoding"), ("<a><encoding/></a>", "no encodedSpace")):
        path.write_bytes(content)
        with h5py.File(path, "r+") as file:
            file["dataset/xml"][0] = xml.encode()
        with pytest.raises(ValueError, match=message):
            read_ismrmrd(path)


# ---------------------------------------------------------------- fastMRI


def fastmri_file(path, coils=3, mask=None, target=True, text=True, slices=2, h=24, w=17, crop=(12, 12), change=None):
    """As published: readout along the rows, lines along the columns, padding at both ends, RSS targets."""
    first, last = 2, 12  # measured columns of 17: the header's centre is 6, so they begin at 17 // 2 - 6
    image = draw(slices, coils or 1, h, w).numpy()
    image[0] *= 3
    k = centred_fft(torch.from_numpy(image)).numpy()
    k[..., :first] = k[..., last + 1 :] = 0
    x = np.sqrt((np.abs(image_of_array(k)) ** 2).sum(1))
    top, left = (h - crop[0]) // 2, (w - crop[1]) // 2
    x = x[:, top : top + crop[0], left : left + crop[1]].astype(np.float32)
    if mask is not None:
        k = k * mask
    if not coils:
        k = k[:, 0]
    if change is not None:
        k = change(k)
    xml = header((h, w, 1), (48, 34, 4.5), (crop[0], crop[1], 1), (24, 24, 4.5), (6, 0), last - first)
    with h5py.File(path, "w") as file:
        file["kspace"] = k
        if text:
            file["ismrmrd_header"] = xml
        if mask is not None:
            file["mask"] = mask.astype(np.float32)
        if target:
            file["reconstruction_rss" if coils else "reconstruction_esc"] = x
            file.attrs["max"], file.attrs["norm"] = x.max(), np.linalg.norm(x)
        file.attrs["acquisition"], file.attrs["patient_id"] = "CORPD_FBK", "secret"
    return k, x


def image_of_array(k):
    return centred_ifft(torch.from_numpy(k)).numpy()


@pytest.mark.parametrize("coils", [3, 0])
def test_fastmri(tmp_path, coils):
    k, target = fastmri_file(tmp_path / "a.h5", coils)
    scan = read_fastmri(tmp_path / "a.h5")
    assert torch.equal(scan.data.squeeze(1) if not coils else scan.data, torch.from_numpy(k))
    assert scan.crop == (12, 12) and scan.spacing_mm == pytest.approx((4.5, 2.0, 2.0))
    assert scan.mask[:, 2:13].all() and not scan.mask[:, :2].any() and not scan.mask[:, 13:].any()
    assert scan.source["acquisition"] == "CORPD_FBK" and scan.source["max"] == pytest.approx(float(target.max()))
    assert scan.source["tr_ms"] == 8.6 and "secret" not in str(scan.source)
    cut = without_oversampling(scan)
    assert cut.data.shape[2:] == (12, 17)
    image = image_of(cut).abs().square().sum(1).sqrt()[:, :, 2:14]  # (17 - 12) // 2 = 2
    assert float((image - torch.from_numpy(target)).abs().max()) < 1e-5
    found = read_fastmri_target(tmp_path / "a.h5")
    assert torch.equal(found.data[:, 0], torch.from_numpy(target))
    # the corner of the target is where the cut image has it
    assert np.allclose((found.affine @ [0, 0, 1, 1])[:3], (cut.affine @ [2, 0, 1, 1])[:3])


def test_fastmri_of_the_test_set(tmp_path):
    mask = np.arange(17) % 3 == 0
    fastmri_file(tmp_path / "a.h5", mask=mask, target=False)
    scan = read_kspace(tmp_path / "a.h5")
    assert scan.mask[0].tolist() == [bool(m) and 2 <= n <= 12 for n, m in enumerate(mask)]
    assert read_fastmri_target(tmp_path / "a.h5") is None
    fastmri_file(tmp_path / "b.h5", text=False)  # no header: empty ends are padding, the crop the challenge's
    scan = read_fastmri(tmp_path / "b.h5")
    assert scan.mask[0].tolist() == [2 <= n <= 12 for n in range(17)] and scan.crop == (17, 17)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["kspace"] = draw(1, 24, 330).numpy()
    assert read_fastmri(tmp_path / "c.h5").crop == (24, 320)


def hole(k):
    k[..., 7] = 0
    return k


def nan(k):
    k[1, 1, 3, 5] = np.nan
    return k


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": hole}, "2 of 34 columns that count as sampled hold nothing but zeros"),
        ({"change": nan}, "1 of 2448 values that are NaN"),
        ({"change": np.abs}, "kspace is float32, which is real"),
        ({"change": lambda k: k[0, 0]}, r"\(slice, coil, row, column\)"),
        ({"mask": np.zeros(17)}, "mask is zero throughout|zero throughout"),
        ({"change": lambda k: k * 0}, "zero throughout"),
    ],
)
def test_fastmri_says_no(tmp_path, options, message):
    fastmri_file(tmp_path / "a.h5", **options)
    with pytest.raises(ValueError, match=message) as caught:
        read_fastmri(tmp_path / "a.h5")
    assert "a.h5" in str(caught.value) and "\n" not in str(caught.value)


def test_hdf5_says_which_keys_there_are(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["k_space"], file["maps"] = np.ones(3), np.ones(2)
    with pytest.raises(ValueError, match="no key 'kspace'; it holds k_space, maps"):
        read_fastmri(path)
    with pytest.raises(ValueError, match="no key 'kspace'; it holds k_space, maps"):
        read_calgary_campinas(path)
    with pytest.raises(ValueError, match="holds k_space, maps; kspace"):
        read_kspace(path)
    fastmri_file(path)
    content = path.read_bytes()
    for part in (content[:300], content[: len(content) // 2]):
        path.write_bytes(part)
        for reader in (read_fastmri, read_kspace, read_fastmri_target):
            with pytest.raises(ValueError, match="not a whole HDF5 file"):
                reader(path)
    path.write_bytes(b"text" * 4000)
    with pytest.raises(ValueError, match="no raw MR data"):
        read_kspace(path)
    with pytest.raises(ValueError, match="not there"):
        read_kspace(tmp_path / "none.h5")


# ---------------------------------------------------------------- Calgary-Campinas and BART


@pytest.mark.parametrize(("h", "w"), [(10, 8), (9, 13)])
def test_calgary_campinas(tmp_path, h, w):
    """The challenge's image is the magnitude of numpy's plain ifft2; ours is the centred one."""
    k = np.random.default_rng(0).normal(size=(4, h, w, 6)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = k
    scan = read_calgary_campinas(tmp_path / "a.h5", measured=1.0)
    image = np.fft.ifft2(k[..., ::2] + 1j * k[..., 1::2], axes=(1, 2)) * np.sqrt(h * w)
    ours = image_of(scan).numpy().transpose(0, 2, 3, 1)
    assert np.abs(np.abs(ours) - np.abs(image)).max() < 1e-5
    part = read_kspace(tmp_path / "a.h5")
    measured = int(np.ceil(0.85 * w))
    assert part.mask.sum() == h * measured and part.mask[:, :measured].all()
    assert part.spacing_mm == (1.0, 1.0, 1.0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = k[..., :5]
    with pytest.raises(ValueError, match="2 coils"):
        read_calgary_campinas(tmp_path / "a.h5")


@pytest.mark.parametrize(("h", "w"), [(10, 8), (9, 13)])
def test_bart_round_trip(tmp_path, h, w):
    mask = torch.ones(h, w, dtype=torch.bool)
    mask[1::2] = False
    affine = np.diag([-0.5, -2.0, 3.0, 1.0])
    scan = KSpace(draw(3, 2, h, w) * mask, mask, affine, source={"name": "x"})
    write_bart(tmp_path / "ksp", scan)
    sizes = (tmp_path / "ksp.hdr").read_text().split("\n")[1].split()
    assert [int(n) for n in sizes] == [w, h, 1, 2, *[1] * 9, 3, 1, 1]  # BART's axes: 3 coils, 13 slices
    flat = np.fromfile(tmp_path / "ksp.cfl", "<c8")
    assert flat[1] == scan.data[0, 0, 0, 1].numpy() and flat[w * 2] == scan.data[0, 0, 2, 0].numpy()
    back = read_bart(tmp_path / "ksp.cfl", spacing_mm=(3.0, 2.0, 0.5))
    assert torch.equal(back.data, scan.data) and torch.equal(back.mask, mask)
    assert back.spacing_mm == scan.spacing_mm
    for path in (tmp_path, tmp_path / "ksp.hdr"):
        assert torch.equal(read_kspace(path).data, scan.data)


def test_bart_slab_and_trajectory(tmp_path):
    x, y, z = 6, 5, 4
    image = draw(2, z, y, x)
    k = centred_fft(image, (-3, -2, -1))
    write_cfl(tmp_path / "a", k.permute(3, 2, 1, 0).numpy())
    scan = read_bart(tmp_path / "a")
    assert scan.data.shape == (x, 2, y, z)
    assert float((image_of(scan) - image.permute(3, 0, 2, 1)).abs().max()) < 1e-5
    track = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    radial = KSpace(draw(2, 3, 30), None, np.eye(4), trajectory=track, shape=(9, 14), source={"name": "x"})
    write_bart(tmp_path / "k", radial)
    back = read_bart(tmp_path / "k", tmp_path / "k_traj", shape=(9, 14))
    assert torch.equal(back.data, radial.data) and torch.allclose(back.trajectory, track, atol=1e-6)
    assert float(read_cfl(tmp_path / "k_traj").squeeze()[0, 3].real) == pytest.approx(float(track[3, 1]) * 14, rel=1e-5)
    with pytest.raises(ValueError, match="trajectory has sizes"):
        read_bart(tmp_path / "k", tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [("# Dimensions\n4 3\n", "its header says 96"), ("4 3", "not a header"), ("# Dimensions\n4 x", "not a header"),
     ("# Dimensions\n4 0", "positive")],
)  # fmt: skip
def test_bart_says_no(tmp_path, text, message):
    (tmp_path / "a.hdr").write_text(text)
    (tmp_path / "a.cfl").write_bytes(b"0" * 90)
    with pytest.raises(ValueError, match=message):
        read_bart(tmp_path / "a")
    with pytest.raises(ValueError, match="not there"):
        read_bart(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds none"):
        read_kspace(tmp_path / "empty")
    write_cfl(tmp_path / "c", np.ones((4, 3, 1, 2, 1, 5), np.complex64))
    with pytest.raises(ValueError, match="axis 5 is not read"):
        read_bart(tmp_path / "c")


# ---------------------------------------------------------------- Siemens twix


def real(name):
    if not (RAW / name).is_file():
        pytest.skip("the twix files are not at hand")
    pytest.importorskip("twixtools")
    return RAW / name


def scans_of(path):
    import twixtools

    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return twixtools.read_twix(str(path), parse_geometry=False, verbose=False)


@pytest.mark.parametrize(
    ("name", "shape", "crop", "spacing"),
    [
        (PHANTOMS[0], (1, 16, 128, 128), (128, 128), (3.0, 2.0, 2.0)),
        (PHANTOMS[1], (1, 32, 64, 64), (64, 64), (30.0, 2.0, 2.0)),
        (PHANTOMS[2], (1, 2, 160, 320), (160, 160), (4.0, 1.25, 1.25)),
    ],
)
def test_twix_of_phantoms(name, shape, crop, spacing):
    """Round, in the middle, the water's surface on top; the readouts are the file's."""
    path = real(name)
    scan = read_twix(path)
    assert scan.data.shape == shape and scan.crop == crop and bool(scan.mask.all())
    assert scan.spacing_mm == pytest.approx(spacing)
    lines = np.stack([block.data for block in scans_of(path)[-1]["mdb"]], axis=1)
    assert np.array_equal(scan.data[0].numpy(), lines)
    energy = scan.data[0].abs().square().sum(0)
    assert np.abs(np.array(np.unravel_index(int(energy.argmax()), energy.shape)) - np.array(shape[2:]) // 2).max() <= 2
    cut = without_oversampling(read_kspace(path))
    assert tuple(cut.data.shape[2:]) == crop and (np.diag(cut.affine)[:2] < 0).all()
    image = image_of(cut)[0].abs().square().sum(0).sqrt()
    inside = image > 0.25 * image.quantile(0.95)
    w = inside.shape[1]
    edge = torch.cat([inside[0], inside[-1], inside[:, 0], inside[:, -1]]).float().mean()
    assert float(edge) < 0.05  # not wrapped
    rows = inside.float().sum(1) / w
    if name != PHANTOMS[1]:  # the third is full to the brim
        filled = torch.nonzero(rows > 0.05)[:, 0]
        top, bottom = rows[filled[0] : filled[0] + 4].max(), rows[filled[-1] - 3 : filled[-1] + 1].max()
        assert float(top) > 1.2 * float(bottom)


def test_twix_place():
    """The middle of the image is the slice's position (sagittal to the left, coronal to the back, transversal up)."""
    scan = without_oversampling(read_kspace(real(PHANTOMS[2])))
    h, w = scan.data.shape[2:]
    assert np.allclose(LPS @ (scan.affine @ [w // 2, h // 2, 0, 1])[:3], [-2.5897, 53.9224, -53.9995], atol=1e-3)
    normal = LPS @ scan.affine[:3, 2] / 4.0
    assert np.allclose(normal, [0, 0.0383878, 0.9992629], atol=1e-4)


def test_twix_with_missing_lines_noise_and_reference(tmp_path):
    """The phantom's file, rewritten as an accelerated scan with its calibration lines and a noise scan."""
    import twixtools

    path = real(PHANTOMS[2])
    (scan,) = scans_of(path)
    full = read_twix(path)
    noise = scan["mdb"][3]
    noise.add_flag("NOISEADJSCAN")
    for line in range(70, 90):
        scan["mdb"][line].add_flag("PATREFSCAN")
    kept = [
        noise,
        *scan["mdb"][70:90],
        *(scan["mdb"][n] for n in range(0, 70, 2)),
        *(scan["mdb"][n] for n in range(90, 160, 3)),
    ]
    scan["mdb"] = kept
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        twixtools.write_twix([scan], str(tmp_path / "a.dat"))
    found = read_twix(tmp_path / "a.dat")
    lines = [n for n in range(160) if (n < 70 and n % 2 == 0) or (n >= 90 and n % 3 == 0)]
    assert found.data.shape == full.data.shape and torch.nonzero(found.mask[:, 0])[:, 0].tolist() == lines
    assert torch.equal(found.data[:, :, lines], full.data[:, :, lines]) and np.allclose(found.affine, full.affine)
    assert torch.equal(found.noise, full.data[0, :, 3])
    assert found.calibration.shape == (1, 2, 20, 320) and torch.equal(found.calibration, full.data[:, :, 70:90])
    cut = without_oversampling(found)
    assert cut.calibration.shape == (1, 2, 20, 160) and cut.data.shape == (1, 2, 160, 160)


def test_twix_truncated_or_none(tmp_path):
    content = real(PHANTOMS[2]).read_bytes()
    for part in (content[:9], content[:200], content[:20000], content[: len(content) // 2], content[:-2000]):
        (tmp_path / "a.dat").write_bytes(part)
        with pytest.raises(ValueError, match=r"not a whole twix file|no twix file"):
            read_twix(tmp_path / "a.dat")
    (tmp_path / "a.dat").write_bytes(b"text" * 4000)
    with pytest.raises(ValueError, match="no twix file"):
        read_twix(tmp_path / "a.dat")


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ismrmrd.hdf5", None)
    monkeypatch.setitem(sys.modules, "twixtools", None)
    scan = KSpace(draw(1, 2, 6, 8), torch.ones(6, 8, dtype=torch.bool), np.eye(4))
    with pytest.raises(ValueError, match=r"pip install invdiff\[mri\]"):
        write_ismrmrd(tmp_path / "a.h5", scan)
    assert not list(tmp_path.iterdir())
    if (RAW / PHANTOMS[1]).is_file():
        with pytest.raises(ValueError, match=r"pip install invdiff\[mri\]"):
            read_twix(RAW / PHANTOMS[1])


def test_readers_are_registered():
    from importlib.metadata import entry_points

    found = {e.name: e for e in entry_points(group="invdiff.datasets")}
    for name, reader in (("ismrmrd", read_ismrmrd), ("fastmri", read_fastmri), ("twix", read_twix), ("bart", read_bart),
                         ("calgary-campinas", read_calgary_campinas)):  # fmt: skip
        assert found[name].load() is reader
