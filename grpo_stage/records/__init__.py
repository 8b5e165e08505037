"""What a run writes down: metrics, completions, logs, and what reads them."""
