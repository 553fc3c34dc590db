"""What a run shows and leaves behind: metrics file, progress, W&B, the final table, the report page."""
