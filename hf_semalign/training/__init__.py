"""A Trainer that works in stages, with its checkpoints and engines."""
