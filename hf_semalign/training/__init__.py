"""A Trainer that trains in stages, with its checkpoints and distributed engines."""
