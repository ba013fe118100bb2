"""Structural re-parameterization as an exact algebra of convolutions."""
