"""Every error that pixart_rt raises on purpose.

    PixArtError                 base; `exit_code` is what the command line returns
    ├── ConfigError             2   a setting that cannot be
    ├── CheckpointError         1   a checkpoint that is missing, truncated or of another model
    ├── DataError               1   a data set or feature store that is missing, damaged or changed
    ├── BundleError             1   a bundle that is incomplete, changed or from another version
    ├── BackendError            1   a backend that is not installed or refused a call
    ├── BuildError              1   an engine that could not be built
    │   └── NumericsError       1   a component whose output is wrong; names its first bad layer
    ├── TrainingError           1   a run that does not learn
    ├── CapacityError           1   a model that does not fit the memory it was given
    └── Cancelled               1   the caller stopped the image

A message is one line: what was requested, what was found, what to do. What was found may be
a damaged file's value of any length, so a message is cut in its middle.
"""

LONGEST = 1500  # characters of a message that are shown whole


class PixArtError(Exception):
    """Base of all errors of this library."""

    exit_code = 1

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


class ConfigError(PixArtError, ValueError):
    """A setting or argument that cannot be."""

    exit_code = 2


class CheckpointError(PixArtError):
    """A checkpoint that is missing, truncated or of another model."""


class DataError(PixArtError):
    """A data set or feature store that is missing, damaged, unfinished or changed."""


class BundleError(PixArtError):
    """An engine bundle that is incomplete, changed or from another version."""


class BackendError(PixArtError):
    """A backend that is not installed, or refused a call."""


class BuildError(PixArtError):
    """An engine that could not be built."""


class NumericsError(BuildError):
    """A component whose output differs from float32 PyTorch by more than its bound."""


class TrainingError(PixArtError):
    """A run that does not learn, such as one whose steps are all skipped."""


class CapacityError(PixArtError):
    """A model that does not fit the memory it was given."""


class Cancelled(PixArtError):
    """The caller asked to stop before the image was finished."""


def shorten(text: str) -> str:
    """A user's text as a message quotes it, on one line whatever its length."""
    return repr(text if len(text) < 60 else f"{text[:57]}...")
