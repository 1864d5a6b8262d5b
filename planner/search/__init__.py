"""The best plan for given GPUs: the space, bounds, the search and how far its answer is proven."""
