"""Why a step takes as long as it does, and what would help: each what-if is a simulation."""
