"""The terms of the objective beside the surrogate, one file a term; `table.py` lists them."""
