"""Where predictions meet runs: what is claimed before one, a profile out of a trace of one, and a
published one replayed.
"""
