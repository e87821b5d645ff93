"""The method, one file per section of the paper: attribution, pairing, map, losses and frontier."""
