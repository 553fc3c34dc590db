"""What a run shows and leaves behind: the metrics file, the progress line, W&B, the final table and the report page."""
