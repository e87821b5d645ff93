"""What is frozen is computed once and kept on disk: scores and signals of the source, and the target's prefix."""
