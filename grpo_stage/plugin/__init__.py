"""What we change in llamafactory: registration and launch."""
