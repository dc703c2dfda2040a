"""weights: what turns files into tensors, and what is learnt from files. Checkpoints, media, data sets, pickles into
safetensors, draft sources, the embedded tiny pair."""

import warnings

from weights.files import UNREADABLE, InputError, describe, replace_file

__all__ = ["UNREADABLE", "InputError", "describe", "replace_file"]

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
