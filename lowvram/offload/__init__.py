"""Offload between device and host: copies, layers streamed ahead, giving way when memory runs out."""
