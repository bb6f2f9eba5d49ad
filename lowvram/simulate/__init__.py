"""A simulated GPU, and dry runs on it: nothing that a run needs imports this room."""
