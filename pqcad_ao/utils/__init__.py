"""What every room may use: files, processes, the machine, and quiet dependencies."""
