"""How good the pictures are, row by row."""
