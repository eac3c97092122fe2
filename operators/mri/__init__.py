"""Magnetic resonance: k-space on the Cartesian grid or on any trajectory, masks, off-resonance.

Axes and units: images (s 1 h w) complex; k-space (s coil h w), or (s coil samples) off the grid; trajectories in
cycles per pixel, (row column), within [-0.5, 0.5); the centred orthonormal Fourier transform throughout.
"""
