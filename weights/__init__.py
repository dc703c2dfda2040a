"""weights: what turns files into tensors, and what is learnt from files. Checkpoints, media, data sets, pickles into
safetensors, draft sources, the embedded tiny pair."""

import kernels  # noqa: F401  what has to be settled before torch is imported
from weights.files import UNREADABLE, InputError, describe, replace_file

__all__ = ["UNREADABLE", "InputError", "describe", "replace_file"]
