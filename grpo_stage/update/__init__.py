"""A step of samples -> the gradient, and what it is made of."""
