"""What keeps a run from being lost: checkpoints, stops, hangs, one run a folder."""
