"""Training: the step and its loss, optimizers, schedules, loss scaling, checkpoints, the trainer."""
