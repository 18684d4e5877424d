"""When the next request comes and how much comes, learned from a model's own traffic. No Ray, no clock, no I/O."""
