"""Offline conversion: read a published checkpoint, merge the LoRA, quantize, write an artifact."""
