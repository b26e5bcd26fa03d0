"""How good images and predictions are."""
