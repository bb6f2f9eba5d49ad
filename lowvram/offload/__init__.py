"""What lies on the host and what on the device: copies, layers streamed ahead, giving way when memory runs out."""
