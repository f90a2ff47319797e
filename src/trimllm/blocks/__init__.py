"""What a model is made of, and how blocks are taken out of it."""
