"""Pages and drawings that hold everything in themselves: filled in from a template, written whole or not at all."""
