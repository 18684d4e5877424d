"""What decides: values in, values out. No Ray, no clock, no I/O, no logging; the cluster and the simulator share it."""
