"""The built-in demo: a fictional knowledge world and, in `base/`, a small base model that was pre-trained on it."""
