"""Talking-avatar video on the cards people own: convert once, infer within a stated memory."""
