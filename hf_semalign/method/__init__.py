"""The method, section by section of the paper: attribution, pairing, map, losses and frontier."""
