"""Long videos in segments: where they are cut, what the next one goes on from, and their files."""
