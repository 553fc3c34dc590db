"""The training loop and what it is made of: data, task, optimizer, schedules, batch norm, checkpoints."""
