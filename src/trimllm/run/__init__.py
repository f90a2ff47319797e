"""The main job: fine-tune, scan, drop, train on, until the target; and what a run remembers and says."""
