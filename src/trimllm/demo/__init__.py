"""The built-in demo: in `base/` a small model that was pre-trained on the world of `tasks.world`, and the job on it."""
