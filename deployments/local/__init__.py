"""A cluster on this machine, of this checkout: what scripts/up starts and scripts/down ends.

All but `serving` is standard library, because scripts/up runs before anything is installed and scripts/down
must work when the environment is broken.
"""
