"""What may explain a scan: logit lens, promotion by MLPs, causal tracing, and their rank correlations."""
