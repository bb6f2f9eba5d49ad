"""The program examines a machine itself: every kernel against its reference, copies, streaming, what is fastest."""
