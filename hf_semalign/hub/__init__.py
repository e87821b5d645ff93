"""Records, model cards, publishing and loading adapters, and inspecting them."""
