"""What we use of llamafactory."""
