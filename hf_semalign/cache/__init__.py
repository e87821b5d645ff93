"""What is frozen is computed once and kept: the source's signals and the target's prefix."""
