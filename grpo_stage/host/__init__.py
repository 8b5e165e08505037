"""The parts of llamafactory that a run uses, and what is refused before a model is loaded."""
