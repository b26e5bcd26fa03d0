"""The ``torch.compile`` backend and AOTInductor packages."""
