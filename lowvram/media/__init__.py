"""Media in and out: portraits, voices, videos."""
