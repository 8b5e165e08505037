"""How long a GRPO step takes on several devices: cards, layouts, costs, and a simulation of steps."""
