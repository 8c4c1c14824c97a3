"""Feature spaces in which samples are compared with data: small networks that are shipped, Inception, DINOv2, pixels."""
