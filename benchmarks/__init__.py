"""Measuring programs, run from a checkout. A package, so that no other of this name hides it."""
