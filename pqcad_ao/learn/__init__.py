"""What is learned: grids without training, bits step by step, and fewer sampling steps."""
