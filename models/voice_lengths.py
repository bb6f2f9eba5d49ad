"""Lengths of voice that are encoded at once, in seconds. Here, where they need none of the encoder's libraries."""

WHOLE_FILE_S = 60
"""Up to this length the encoder attends to the whole file at once; attention goes with the square of the length."""
WINDOW_S = 30
CONTEXT_S = 5
"""Longer audio goes in windows of at most 30 s plus 5 s on either side that is encoded and dropped."""
