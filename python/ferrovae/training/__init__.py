"""Configuration, the training loop and checkpoints. Free of torch at import: the command line reads it for `--help`."""
