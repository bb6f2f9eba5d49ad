"""Memory over the time of a run: written while it goes, read again, and drawn."""
