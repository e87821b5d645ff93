"""The method, section by section of the paper."""
