"""Many videos from one list: read, made one after the other, told of in a table."""
