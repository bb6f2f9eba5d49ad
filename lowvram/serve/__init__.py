"""A process that stays: a queue of jobs, an HTTP API above it, and a page above that."""
