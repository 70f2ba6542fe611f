"""Commands: one file each, imported when it is asked for. The value is what `mindgen --help` says of it."""

COMMANDS = {
    "generate": "generate text: greedy, sampling, beam search, or chat",
    "predict": "answer a file of JSON lines, with PaddleNLP's flags and formats; --benchmark times it",
    "run_generator": "answer prompts and measure it, with MindIE's flags",
    "engine_test": "serve the requests of a CSV file of token ids, and print their latencies",
    "bench": "measure prefill, decode and serving beside the bounds of this machine",
}
