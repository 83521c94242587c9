"""The plain model of the training tests, as the oracle of the ablation's."""

from tests.training.conftest import plain_dit, plain_positions

__all__ = ["plain_dit", "plain_positions"]
