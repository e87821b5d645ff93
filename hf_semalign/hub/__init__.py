"""Cards, publishing and inspection of adapters."""
