"""What a training step or a generated video will take, found out without a GPU; see ``bernini estimate --help``."""
