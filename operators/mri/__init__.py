"""Magnetic resonance: k-space sampled on the Cartesian grid."""
