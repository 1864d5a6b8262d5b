"""What a residual did in a training run: reads recordings, sounds alarms, draws."""
