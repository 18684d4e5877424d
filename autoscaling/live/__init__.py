"""Ray's side of what decides."""
