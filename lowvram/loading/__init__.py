"""From an artifact to modules with their 8-bit layers and fused blocks."""
