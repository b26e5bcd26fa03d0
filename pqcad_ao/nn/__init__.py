"""What stays in a quantized network, and how it is saved and loaded."""
