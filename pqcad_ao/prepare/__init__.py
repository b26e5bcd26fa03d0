"""From a plan to fake quantizers on fitted grids, and from those to quantized modules."""
