"""One stage of training: what trains, on what, and how memory and time are saved."""
