"""Encoders: portrait, voice and prompt to what the DiT is conditioned on."""
