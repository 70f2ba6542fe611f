"""From a path to an engine that runs: headers and tokenizer, then ranks, then weights and cache."""
