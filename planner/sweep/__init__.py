"""Many plans: every combination of values, worked out on all cores, kept, shown; and the fast
estimate that ranks them.
"""
