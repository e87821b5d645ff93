"""Model cards, publishing, and a look at an adapter."""
