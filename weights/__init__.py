"""weights: what turns files into tensors. Checkpoints, media, pickles into safetensors, the embedded tiny pair."""

import warnings

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: path, reason, way out. bench.py exits 2 with it."""
