"""Calibration: what storing the DiT's Linears in 8 bit costs at their outputs, measured on a short run."""
