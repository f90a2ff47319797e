"""How good a model is on items: accuracy, likelihood, generation."""
