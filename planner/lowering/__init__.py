"""From a plan to its Program: what a chunk does, keeps and costs, and where it stands on ranks."""
