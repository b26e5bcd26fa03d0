"""ExecuTorch: a ``.pte`` for the stock XNNPACK runtime."""
