"""The only package that imports or changes llamafactory."""
