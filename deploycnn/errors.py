"""Every error that a user can mend, as one tree.

::

    DeployCNNError            exit code 2, one line, no traceback
    ├── RecipeError           a recipe's key, value or chain of passes is wrong
    ├── SourceError           a model cannot be built or loaded
    ├── DataError             a dataset is missing, empty, corrupt or mislabelled
    ├── PreprocessingError    a model met images prepared otherwise than it was trained on
    ├── PassRequirementError  a pass cannot be applied to this model
    ├── TrainingError         training diverged
    ├── ParityError           an exported graph does not compute what its model computes
    ├── RuntimeUnavailable    a runtime, provider or package that was asked for is not usable here
    │   └── TimingUnavailable a model cannot be timed here as the engine that it would become elsewhere
    ├── ArtifactError         a stored artifact or run directory is damaged, foreign or of another schema
    └── StorageError          the disk is full or not writable

Anything else is our bug and keeps its traceback. Errors of other libraries are mapped to these where they
cross into our code, with ``raise ... from error``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class DeployCNNError(Exception):
    """Base of all errors that the user can mend.

    The message is one line: what is wrong, where (file or key), which value, and how to mend it.
    """


class RecipeError(DeployCNNError):
    """A recipe's key, value or chain of passes is wrong."""


class SourceError(DeployCNNError):
    """A model cannot be built or its weights cannot be loaded."""


class DataError(DeployCNNError):
    """A dataset is missing, empty, corrupt or mislabelled."""


class PreprocessingError(DeployCNNError):
    """A model met images prepared otherwise than the images it was trained on."""


class PassRequirementError(DeployCNNError):
    """A pass cannot be applied to this model."""


class TrainingError(DeployCNNError):
    """Training diverged (NaN or infinite loss)."""


class ParityError(DeployCNNError):
    """An exported graph does not compute what its model computes."""


class RuntimeUnavailable(DeployCNNError):  # noqa: N818 - "unavailable" already says that it is an error
    """A runtime, execution provider or package that was asked for is not usable here."""


class TimingUnavailable(RuntimeUnavailable):
    """A model cannot be timed here as the engine that it would become: no engine of it is built, or it does not load.

    It may well be deployed elsewhere, so a pass that only prefers to time goes on without, and says so.
    """


class ArtifactError(DeployCNNError):
    """A stored artifact or run directory is damaged, foreign or of another schema version."""


class StorageError(DeployCNNError):
    """The disk is full or not writable."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known word, then all of them.

    >>> nearest("epocs", ["epochs", "seed"])
    'did you mean "epochs"? Known: epochs, seed'
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    listing = f"Known: {', '.join(options)}" if options else "None are known"
    return f'did you mean "{close[0]}"? {listing}' if close else listing


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """A foreign library's message on one line, without source locations, at most ``limit`` characters."""
    text = re.sub(r"(?:Exception from |Check '.*?' failed at )\S+:\d+:?", "", str(error))
    text = re.sub(r"/\S*/(\S+\.(?:cc|cpp|h)):\d+ [^|]*?\)\s", "", text)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
