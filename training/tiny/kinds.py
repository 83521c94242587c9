"""The data sets of drawn scenes that a recipe can name. Imports nothing heavy."""

from enum import StrEnum


class Scenes(StrEnum):
    """What scenes show and what their captions say (scenes.py)."""

    CLASSES = "scenes-classes"
    """One object; its shape is the class. For a phase of classes."""
    DENSE = "scenes"
    """One to three objects; the caption names them all."""
    SPARSE = "scenes-sparse"
    """The same scenes; the caption names one of the objects."""
