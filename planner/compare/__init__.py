"""Two steps side by side: plans, reports or traces; as data, as text and as a page."""
