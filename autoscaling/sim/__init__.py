"""The cluster on a virtual clock: the same decisions, over a trace instead of users. No Ray, no real time, no I/O."""
