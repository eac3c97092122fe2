"""How measurements see an image, and lifts: images made of measurements by one adjoint and one filter.

A lift is the best circulant filter of b = A^H y for white images x ~ N(0, d^2 I): in the Fourier domain
h = d^2 c / (d^2 r + s^2 c), with c the diagonal of A^H A there, r the squared norm of its rows (what aliases into a
frequency) and s the noise of y. It is linear in y, costs one adjoint, is filtered backprojection with a noise-dependent
window for CT, and for a unitary A exactly EDM's c_skip x. Of white images it recovers the share h c of a frequency's
variance: this is what coverage maps, the fusion of two lifts and the preconditioning of the network are made of.
A second step of Richardson's iteration with this filter, linear in y too, makes up for what of A is not circulant.
Images are not white: most of what they are lies at low frequencies, which a filter for white ones believes noise. From
three steps on a lift is those of CG for images whose power falls with the square of the frequency.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.linalg import cg
from invdiff.noise import KeyedNoise

STEP = -3  # of the keyed noise that probes an operator
BOX = 5  # pixels over whose square estimates are averaged: probes are few
RINGS = ((0.0, 1), (2.5, 3), (6.0, 5))  # cycles an image from which on, and frequencies over whose square, likewise
LEAST = 0.03  # of the most that a frequency's transfer can be, its row's norm: no lift loses a frequency
SMOOTH = 8.0  # variance of a row's signal over that of white images: bodies are smooth, and rows add them up
NEAR = 0.97  # of a frequency's variance that steps of CG are believed to recover at most
LINEAR = 2  # steps of a lift that are linear in y
TOLERANCE = 0.003  # relative residual at which steps of CG end: under much noise after three or four
FALL = 2  # power of the frequency (cycles an image) with which the variance of images falls, where more steps are taken
MOST = 1 - 1e-4  # of a frequency's variance that a lift is believed to recover: images are not white


class Response(NamedTuple):
    """What A^H A does to white images.

    transfer: the diagonal of A^H A in the Fourier domain (s c ...); power: squared norms of its rows there (s c ...),
    both at the frequencies of ``rfft2`` of images that are padded to about twice their size; where: its diagonal
    over pixels, mean 1 (s 1 h w); trace: its trace (s).
    """

    transfer: Tensor
    power: Tensor
    where: Tensor
    trace: Tensor

    def share(self, part: float) -> Response:
        """Of a part of the views, chosen at random: the diagonal is theirs, what they alias adds as if unrelated."""
        square = self.transfer.square()
        return Response(
            part * self.transfer, part**2 * square + part * (self.power - square), self.where, part * self.trace
        )

    def to(self, device: torch.device | str) -> Response:
        """The same on ``device``."""
        return Response(*(t.to(device) for t in self))


class Lift(NamedTuple):
    """image: (s c h w), prior units about 0; coverage: of each pixel in [0, 1] or so (s 1 h w).

    kept: share of the variance that the lift recovers, of each frequency (s c ...), in [0, 1); power: the variance of
    the image there, over its mean (1 1 ...).
    """

    image: Tensor
    coverage: Tensor
    kept: Tensor
    power: Tensor

    @property
    def recovered(self) -> Tensor:
        """``kept`` of the whole image, (s 1 1 1)."""
        return (self.power * self.kept).mean((1, 2, 3), keepdim=True)


def response_of(operator: Any, probes: int = 6) -> Response:
    """The response of a linear operator, estimated with white images, the same at every call.

    Rows that whitening weighted are taken as if it had not: see ``lift``.

    Args:
        operator: linear, in prior units with norm about 1, on real images (s c h w).
        probes: products with A^H A.
    """
    like = torch.empty(operator.domain.shape, dtype=operator.domain.dtype, device=getattr(operator, "device", "cpu"))
    weights = weights_of(operator)
    even = None if weights is None else _equaliser(weights, 0.0)
    cross, power, energy, where, square = (torch.zeros((), device=like.device) for _ in range(5))
    for draw in range(probes):
        x = KeyedNoise()(STEP, like[:1], draw).expand(like.shape).clone()  # the same for all, alone or among others
        b = operator.normal(x) if even is None else operator.adjoint(even * operator.forward(x))
        X, B = torch.fft.fft2(x), torch.fft.fft2(b)
        cross, power, energy = cross + (X.conj() * B).real, power + B.abs().square(), energy + X.abs().square()
        where, square = where + (x * b).sum(1, keepdim=True), square + x.square().sum(1, keepdim=True)
    energy = _by_ring(energy)
    power = _by_ring(power) / energy
    transfer = torch.maximum(_by_ring(cross) / energy, LEAST * power.sqrt())
    place = (_smooth(where, BOX) / _smooth(square, BOX)).clamp_min(0)
    mean = place.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(place.dtype).tiny)
    power = torch.maximum(power, transfer.square())
    return Response(_wide(transfer), _wide(power), place / mean, transfer.sum((1, 2, 3)))


def _margins(h: int, w: int) -> tuple[int, int, int, int]:
    """Pixels by which an image is padded before it is filtered: a backprojection does not end at the edge."""
    return (w // 2, w // 2, h // 2, h // 2)


def _wide(v: Tensor) -> Tensor:
    """A function of the frequency (s c h w), interpolated to the half plane of the padded image's."""
    (h, w), m = v.shape[-2:], _margins(*v.shape[-2:])
    size = h + m[2] + m[3], w + m[0] + m[1]
    cycles = torch.fft.fftfreq(size[0], device=v.device), torch.fft.rfftfreq(size[1], device=v.device)
    places = [2 * (n // 2 + n * f.to(v.dtype)) / (n - 1) - 1 for n, f in zip((h, w), cycles, strict=True)]
    grid = torch.stack(torch.meshgrid(*places, indexing="ij")[::-1], -1).expand(len(v), -1, -1, -1)
    return F.grid_sample(torch.fft.fftshift(v, dim=(-2, -1)), grid, padding_mode="border", align_corners=True)


def _by_ring(v: Tensor) -> Tensor:
    """Means over boxes that grow with the frequency: near 0 the response of projections changes fast. (s c h w)."""
    h, w = v.shape[-2:]
    f = torch.hypot(*(n * torch.fft.fftfreq(n, device=v.device).view(s) for n, s in ((h, (-1, 1)), (w, (1, -1)))))
    out = v
    for start, box in RINGS[1:]:
        out = torch.where(f >= start, _smooth(v, box), out)
    return out


def _smooth(v: Tensor, box: int) -> Tensor:
    """Mean over a box, periodic: (s c h w)."""
    half = [min(box, n - (n + 1) % 2) // 2 for n in v.shape[-2:]]
    wide = F.pad(v, (half[1], half[1], half[0], half[0]), mode="circular")
    return F.avg_pool2d(wide, (2 * half[0] + 1, 2 * half[1] + 1), 1)


def weights_of(operator: Any) -> Tensor | None:
    """What whitening multiplied each measurement by, relative to their mean square; None where it was nothing."""
    weights = getattr(operator, "row_weights", None)
    return None if weights is None else weights / weights.square().mean().sqrt()


def noise_of(operator: Any, noise: float, least: float) -> Any:
    """Noise of whitened measurements, of standard deviation ``least``, whose rows without the weights w get ``noise``.

    max(w noise, least), of each measurement: a ray whose own noise is more keeps it. One number where w is 1.
    """
    weights = weights_of(operator)
    if weights is None:
        return max(noise, least)
    return (weights * noise).clamp_min(max(least, torch.finfo(weights.dtype).tiny))


def _equaliser(weights: Tensor, noise_ratio: float) -> Tensor:
    """(1 + t) / (w^2 + t): undoes weights w, but of rows whose signal is below the noise."""
    t = max(noise_ratio, LEAST**2)
    return (1 + t) / (weights.square() + t)


def lift(
    operator: Any,
    y: Tensor,
    response: Response,
    noise: float,
    deviation: float,
    steps: int = 1,
    mask: Any = 1.0,
    under: float = 0.0,
    least: float | None = None,
) -> Lift:
    """The lift of y: ``steps`` of x <- x + h (A^H D (y - A x) - (s / d)^2 x) from 0, h the filter above; or of CG.

    More than ``LINEAR`` steps are CG's, at most, for (A^H D A + s^2 / (d^2 P)) x = A^H D y, P ~ 1 / (1 + f^2),
    f in cycles an image. They are homogeneous in y but not linear, and much nearer (root mean square error for 30 to
    60 views of bodies, rms 0.8: 0.09 against 0.36 by two of the filter at the scans' own noise, 0.26 against 0.69 at
    s = 1; for fourfold MR, rms 0.21: 0.07 and 0.12 against 0.07 and 0.21).

    For a unitary A the first step of the filter is the best linear estimate of white images, and the second stays
    there. D is the identity, or undoes the weights of whitening, which are far from circulant (photon counts of a
    body's rays differ by orders of magnitude), where the signal is above the noise.

    Args:
        operator: A, linear.
        y: (s ...).
        response: of A, or of the part of it that ``mask`` leaves.
        noise: standard deviation s of a real component of y.
        deviation: d, of images in prior units.
        steps: each after the first costs one product with A^H A, those of CG the first one too.
        mask: 1 for the measurements that are used, else 0.
        under: standard deviation of white noise that the image was under before it was measured.
        least: what the whitened y's noise was before that of its rows without weights was raised to ``noise``, see
            ``noise_of``; None where y's own noise is ``noise``.
    """
    seen = _seen(operator, response, noise, (deviation**2 + under**2) ** 0.5, least)
    if steps > LINEAR:
        return _lift_of_images(operator, y, response, seen, (under / deviation) ** 2, steps, mask)
    h = torch.where(seen.transfer > 0, seen.power * seen.transfer / seen.total, 0.0)
    image = _filtered(h, operator.adjoint(mask * seen.even * y))
    for _ in range(steps - 1):
        left = operator.adjoint(mask * seen.even * (y - operator.forward(image)))
        image = image + _filtered(h, left - seen.shrink * image)
    share = deviation**2 / seen.power
    kept = share * (h * seen.transfer).clamp(0, MOST)
    return Lift(share * image, kept.mean((1, 2, 3), keepdim=True) * response.where, kept, torch.ones_like(kept[:1, :1]))


def _lift_of_images(
    operator: Any, y: Tensor, response: Response, seen: _Seen, under: float, steps: int, mask: Any
) -> Lift:
    """Steps of CG for images whose power falls; ``under``: variance of the white noise on the image, over the image's.

    In u = G^-1 x with G = (c + s^2 / (d^2 P))^-1/2 and c the mean of the diagonal of A^H D A: it takes P's range off.
    """
    c, rho = seen.transfer, seen.shrink * (1 + under)  # (s / d)^2, the image's own d
    h, w = response.where.shape[-2:]
    fall = falling(h, w, c)
    power = fall + under
    g = (c.sum((1, 2, 3), keepdim=True) / c[0].numel() + rho / power).rsqrt()

    def through(v: Tensor, by: Tensor) -> Tensor:
        return torch.fft.irfft2(by * torch.fft.rfft2(v), s=(h, w))

    def normal(u: Tensor) -> Tensor:
        x = through(u, g)
        return through(operator.adjoint(mask * seen.even * operator.forward(x)), g) + through(u, g * g * rho / power)

    u = cg(normal, through(operator.adjoint(mask * seen.even * y), g), None, steps, TOLERANCE)
    image = through(u, g * fall / power)
    wide = _margins(h, w)
    fall = falling(h + wide[2] + wide[3], w + wide[0] + wide[1], c)
    power = fall + under
    kept = fall * seen.share.clamp(max=NEAR) / (power + rho * seen.per_gain)
    lines = torch.full_like(fall, 2.0)  # of the whole plane's frequencies a column of the half plane stands for
    lines[..., 0] = 1.0
    return Lift(image, kept.mean((1, 2, 3), keepdim=True) * response.where, kept, fall * lines / (fall * lines).mean())


def falling(h: int, w: int, like: Tensor) -> Tensor:
    """Variance of images at the frequencies of ``rfft2``, over its mean: (1 1 h w//2+1).

    It falls with the power ``FALL`` of the frequency from one cycle an image on, as that of natural images does.
    """
    f = torch.hypot(h * torch.fft.fftfreq(h)[:, None], w * torch.fft.fftfreq(w)[None])
    power = 1 / (1 + f**FALL)
    return (power / power.mean())[None, None, :, : w // 2 + 1].to(like)


def evened(
    operator: Any, residual: Tensor, response: Response, noise: float, deviation: float, mask: Any = 1.0
) -> Tensor:
    """A^H D r under the filter that gives every frequency of an image's white error the same variance, its own.

    Args:
        operator: A, linear.
        residual: r = A x - y (s ...).
        response: of A, or of the part of it that ``mask`` leaves.
        noise: standard deviation of a real component of y.
        deviation: of the error of x.
        mask: 1 for the measurements that are used, else 0.

    Returns:
        (s c h w); its mean square is about that of the error where y is noiseless.
    """
    seen = _seen(operator, response, noise, deviation)
    h = torch.where(seen.transfer > 0, deviation / seen.total.sqrt(), 0.0)
    return _filtered(h, operator.adjoint(mask * seen.even * residual))


class _Seen(NamedTuple):
    """even: D; power: d^2; transfer: of A^H D A; rows: squared norm of its rows; total: variance of A^H D y there.

    shrink: (s / d)^2 after D.
    """

    even: Any
    power: float
    transfer: Tensor
    rows: Tensor
    total: Tensor
    shrink: float

    @property
    def share(self) -> Tensor:
        """How many of the frequencies about each A sees, if it is a mask on them: t^2 / r for t and r times 0 or g."""
        return self.transfer * self.per_gain

    @property
    def per_gain(self) -> Tensor:
        """1 / g of those that it sees."""
        return self.transfer / self.rows.clamp_min(torch.finfo(self.rows.dtype).tiny)


def _seen(operator: Any, response: Response, noise: float, deviation: float, least: float | None = None) -> _Seen:
    """What becomes of white images of ``deviation`` and of white noise in A^H D y."""
    power, square, first, second, loud = deviation**2, noise**2, 1.0, 1.0, 1.0
    even: Any = 1.0
    weights = weights_of(operator)
    if weights is not None:
        if least is None:
            signal = SMOOTH * power * float(response.trace.mean()) / weights[0].numel()
            even = _equaliser(weights, square / signal)
        else:  # the rows without weights, but for those whose own noise is more
            even = (noise / noise_of(operator, noise, least)).square()
        gain = even * weights.square()
        first, second = float(gain.mean()), float(gain.square().mean())
        loud = float((even * gain).mean()) if least is None else first
    c = response.transfer
    rows = first**2 * c.square() + second * (response.power - c.square())
    total = (power * rows + square * loud * c).clamp_min(torch.finfo(c.dtype).tiny)
    return _Seen(even, power, first * c, rows, total, loud / first * square / power)


def _filtered(h: Tensor, b: Tensor) -> Tensor:
    """b (s c h w) under a filter over the frequencies of the padded image."""
    rows, columns = b.shape[-2:]
    left, _, top, _ = margins = _margins(rows, columns)
    wide = F.pad(b, margins, mode="replicate")
    out = torch.fft.irfft2(h * torch.fft.rfft2(wide), s=wide.shape[-2:])
    return out[..., top : top + rows, left : left + columns]


def nothing(like: Tensor) -> Lift:
    """The lift of no measurements: of the shape of ``like`` (s c h w)."""
    zero, (h, w) = torch.zeros_like(like), like.shape[-2:]
    kept = zero.new_zeros((*like.shape[:2], h + 2 * (h // 2), (w + 2 * (w // 2)) // 2 + 1))
    return Lift(zero, zero[:, :1], kept, torch.ones_like(kept[:1, :1]))


def fused(one: Lift, other: Lift) -> tuple[Tensor, Tensor]:
    """The best estimate of images from two lifts with unrelated errors, and its error.

    Returns:
        Image (s c h w), and the share of the variance that it leaves unknown (s 1 1 1).
    """
    a, b = 1 - one.kept, 1 - other.kept
    left = 1 / (1 / a + 1 / b - 1)
    if not bool((one.kept > 0).any()):
        return other.image, (other.power * b).mean((1, 2, 3), keepdim=True)
    image = _filtered(left / a, one.image) + _filtered(left / b, other.image)
    return image, (other.power * left).mean((1, 2, 3), keepdim=True)
