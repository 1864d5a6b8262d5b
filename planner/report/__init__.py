"""The answer to a what-if: its JSON, how it is made from a prediction, its text, how sure it is."""
