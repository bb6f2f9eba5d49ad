"""What the command line's commands do with their options."""
