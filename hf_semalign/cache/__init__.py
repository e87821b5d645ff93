"""What is frozen is computed once: scores and signals of the source on disk, and the target prefix in memory."""
