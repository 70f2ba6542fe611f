"""Large language models over many devices, from the weights people have."""
