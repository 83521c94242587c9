"""The small models of tests/model."""

from tests.model.conftest import ours_of, reference, small_config

__all__ = ["ours_of", "reference", "small_config"]
