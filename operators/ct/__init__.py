"""X-ray CT. The geometry is written here, once; docs/geometry.md has the picture. It is ASTRA's.

World axes, in mm, origin at the rotation centre, which is the middle of the image: x to the right (columns), y up, so
against the rows. The middle of the pixel in row i, column j of an image (h w) is at

    x = (j - (w - 1) / 2) * pixel_mm        y = ((h - 1) / 2 - i) * pixel_mm

A view at angle θ (radians, counter-clockwise as seen with x right and y up) has its detector along
(cos θ, sin θ). The middle of element j of D is at the detector coordinate

    u = (j - (D - 1) / 2) * detector_mm + detector_offset_mm

- Parallel beam: the ray of u runs through u (cos θ, sin θ) along (sin θ, -cos θ), so that x cos θ + y sin θ = u.
- Fan beam, flat detector: the source is at source_origin_mm * (sin θ, -cos θ); the detector's u = 0 is at
  (source_detector_mm - source_origin_mm) * (-sin θ, cos θ); u is measured on the detector itself, not scaled to the
  rotation centre.

At θ = 0 the fan-beam source is below the image and the detector above it, u from left to right.

Images are attenuation in 1/mm, measurements line integrals without unit, (s c angle detector).
"""
