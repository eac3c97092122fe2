"""Volume, block means and the places of voxels in the world."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invdiff.datasets import Storage, Volume, block_mean, pad_to_multiple, read_volume
from invdiff.datasets.orientation import centred_affine

AFFINE = np.array([[-0.7, 0.05, 0.1, 31.0], [0.02, -0.9, 0.2, -12.5], [0.01, 0.1, 2.5, 7.0], [0, 0, 0, 1]])


def linear_field(affine: np.ndarray, shape: tuple[int, int, int]) -> torch.Tensor:
    """(s 1 h w): 3 x + 5 y - 2 z + 10 of each voxel's place in RAS mm."""
    s, h, w = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.einsum("ij,j...->i...", affine, np.stack([w, h, s, np.ones_like(w)]).astype(float))
    return torch.from_numpy(3 * world[0] + 5 * world[1] - 2 * world[2] + 10).float()[:, None]


def test_block_mean_keeps_places():
    volume = Volume(linear_field(AFFINE, (5, 12, 18)), AFFINE, "HU")
    small = block_mean(volume, 3)
    assert small.data.shape == (5, 1, 4, 6)
    assert (small.data - linear_field(small.affine, (5, 4, 6))).abs().max() < 1e-3
    assert np.allclose(small.spacing_mm, np.array(volume.spacing_mm) * (1, 3, 3))
    assert (small.data - linear_field(AFFINE, (5, 4, 6))).abs().max() > 1  # the old affine would be wrong


def test_block_mean_refuses_what_does_not_divide():
    volume = Volume(linear_field(AFFINE, (5, 12, 17)), AFFINE, "HU")
    with pytest.raises(ValueError, match="12 x 17 pixels cannot be averaged 3 x 3"):
        block_mean(volume, 3)
    with pytest.raises(ValueError, match="by 0"):
        block_mean(volume, 0)


def test_pad_to_multiple_keeps_places():
    volume = Volume(linear_field(AFFINE, (5, 11, 17)), AFFINE, "HU")
    padded = pad_to_multiple(volume, 4, -1000.0)
    assert padded.data.shape == (5, 1, 12, 20)
    assert torch.equal(padded.data[:, :, :11, :17], linear_field(padded.affine, (5, 11, 17)))
    assert (padded.data[:, :, 11:] == -1000).all() and (padded.data[..., 17:] == -1000).all()


def test_centred_affine():
    affine = centred_affine((4, 5, 7), (2.0, 1.5, 0.5))
    assert np.allclose(affine @ (3, 2, 1.5, 1), (0, 0, 0, 1))
    volume = Volume(torch.zeros(4, 1, 5, 7), affine, "HU")
    assert volume.spacing_mm == (2.0, 1.5, 0.5)
    left, posterior, superior = affine[:3, :3] @ (1, 1, 1)
    assert left < 0 and posterior < 0 and superior > 0


def test_volume_does_not_share_its_affine():
    affine = AFFINE.copy()
    volume = Volume(torch.zeros(2, 1, 3, 4), affine, "HU")
    affine[0, 3] = 99
    assert volume.affine[0, 3] == 31.0
    with pytest.raises(ValueError):
        volume.affine[0, 3] = 1


@pytest.mark.parametrize(
    ("data", "affine", "message"),
    [
        (torch.zeros(2, 3, 4), AFFINE, "shape"),
        (torch.zeros(2, 1, 0, 4), AFFINE, "shape"),
        (torch.zeros(2, 1, 3, 4).double(), AFFINE, "float64"),
        (torch.full((2, 1, 3, 4), torch.nan), AFFINE, "24 of 24 voxels are NaN"),
        (torch.zeros(2, 1, 3, 4) - torch.inf, AFFINE, "infinite"),
        (torch.zeros(2, 1, 3, 4), AFFINE[:3], r"\(3, 4\)"),
        (torch.zeros(2, 1, 3, 4), AFFINE * np.nan, "finite"),
        (torch.zeros(2, 1, 3, 4), np.diag([1.0, 0, 1, 1]), "plane"),
        (torch.zeros(2, 1, 3, 4), np.ones((4, 4)), "last row"),
    ],
)
def test_volume_says_no(data, affine, message):
    with pytest.raises(ValueError, match=message):
        Volume(data, affine, "HU")


def test_storage_says_no():
    with pytest.raises(ValueError, match="permutation"):
        Storage((0, 1, 1))
    with pytest.raises(ValueError, match="booleans"):
        Storage((0, 1, 2), (0, 1, 0))  # type: ignore[arg-type]


def test_no_permission(tmp_path, monkeypatch):
    (tmp_path / "a.nii").write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for path in (tmp_path, tmp_path / "a.nii"):
        with pytest.raises(ValueError, match="permission denied"):
            read_volume(path)
