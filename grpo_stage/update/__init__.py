"""A step of samples -> its gradient."""
