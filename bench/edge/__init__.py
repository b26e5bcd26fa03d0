"""One sampling step as a .pte on ExecuTorch's stock runtime, this project's beside XNNPACK's own."""
