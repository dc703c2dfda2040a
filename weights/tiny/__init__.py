"""tiny: the embedded, trained pair, and the scripts that made it. See README.md in `clips` for the recordings."""
