"""Commands: one file each, imported when it is asked for. The value is what `mindgen --help` says of it."""

COMMANDS = {
    "generate": "generate text: greedy, sampling, beam search, or chat",
}
