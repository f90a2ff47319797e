"""Progressive layer dropping while fine-tuning: half the depth of a causal LM, as a stock checkpoint."""
