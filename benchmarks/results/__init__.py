"""What the model says: tables of predicted figures, printed and kept in ``docs/results.md``.

python -m benchmarks.results [NAME ...] [--write]
"""
