"""Models in and out: folders of safetensors, loaded, cut from folder to folder, written and verified."""
