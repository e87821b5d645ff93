"""The layerwise trainer and what it stands on."""
