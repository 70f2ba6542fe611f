"""What run_generator and engine_test share: MindIE's flags, prompts, plugins and files."""
