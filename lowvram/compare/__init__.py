"""How far one run is from another: latents, frames, stages."""
