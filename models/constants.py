"""Constants of the published model, here where they need none of the encoders' libraries.

Source: model-spec sections 2 to 5, which is the published source (CONTRIBUTING.md, "Of others and of our own"); the
lengths of voice are ours.
"""

FPS = 25
"""Frames of video a second."""
SPEECH_RATE_HZ = 16_000
"""Samples a second of the voice, as wav2vec2 takes it."""
LATENT_CHANNELS = 16
FRAMES_PER_LATENT = 4
"""Frames of video a latent frame, behind the first one of a video."""
PIXELS_PER_LATENT = 8
"""On either side of the picture."""
MOTION_FRAMES, MOTION_LATENTS = 73, 19
"""Frames of video that a clip looks back on, and the latent frames that they make."""
PRIMING_LATENTS = 7
"""The pipeline primes its decoder with ``motion_latents[:, :7]``."""
DROPPED_FIRST_FRAMES = 3
"""Frames that the pipeline drops from a video's first decoded block; the decoder itself gives 4 frames a latent."""

WHOLE_FILE_S = 60
"""Up to this length the encoder attends to the whole file at once; attention goes with the square of the length."""
WINDOW_S = 30
CONTEXT_S = 5
"""Longer audio goes in windows of at most 30 s plus 5 s on either side that is encoded and dropped."""
