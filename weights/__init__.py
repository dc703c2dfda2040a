"""weights: what turns files into tensors. Checkpoints, media, pickles into safetensors, the embedded tiny pair."""

import warnings

# torch looks for numpy at import and says so when it is absent. Nothing at run time needs numpy here.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: path, reason, way out. bench.py exits 2 with it.

    Whatever a path or a file puts into it, the line stays one: line breaks, control characters and halves of surrogate
    pairs are spelt out."""

    def __init__(self, line: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
