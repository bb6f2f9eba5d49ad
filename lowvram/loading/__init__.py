"""Loading of an artifact's modules, with their 8-bit layers and fused blocks."""
