"""How fast a model is, and how many bytes a decode step reads."""
