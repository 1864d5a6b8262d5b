"""Proof that a schedule is sound: of stream programs, and of torch's CSVs without torch."""
