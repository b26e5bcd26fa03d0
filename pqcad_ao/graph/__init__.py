"""A network as a graph: captured, its operators and roles known, its plan resolved."""
