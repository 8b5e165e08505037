"""Imported by the .pth at interpreter start."""
