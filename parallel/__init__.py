"""Where tensors live across processes. See README.md."""
