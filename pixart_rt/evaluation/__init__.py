"""Measures of images: fidelity of approximate settings against exact ones."""
