"""The options of `generate`; its flags come from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from mindgen.commands.tasks import TASKS, find_tasks
from mindgen.config import option
from mindgen.text.prompt_types import PROMPT_TYPES, prompt_type


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate and how to show it. The defaults are those that MindSpeed-LLM documents."""

    task: tuple[str, ...] = option(("greedy_search",), f"one or several of {', '.join(TASKS)}", style="several")
    stream: bool = option(False, "print the text while it is generated; several prompts come in order")
    prompt: tuple[str, ...] = option((), "a prompt; may be repeated (default: how are you?)", style="repeat")
    prompt_ids: tuple[str, ...] = option((), "a prompt as token ids: 1,5,7; may be repeated", style="repeat")
    prompt_file: str | None = option(None, "prompts, one a line or JSON lines with `prompt`; - is standard input")
    hf_chat_template: bool = option(False, "put each prompt into the tokenizer's chat template")
    prompt_type: str | None = option(None, f"put each prompt into the layout of this name: {', '.join(PROMPT_TYPES)}")
    max_new_tokens: int = option(128, "the most tokens to generate for a prompt")
    max_length: int | None = option(None, "the most tokens of prompt and answer together; the smaller limit wins")
    temperature: float = option(1.0, "divides the logits when sampling; 0 is greedy")
    top_k: int = option(0, "sample from the k most probable tokens; 0 is all")
    top_p: float = option(1.0, "sample from the most probable tokens that reach this probability; 1.0 is all")
    num_beams: int = option(2, "beams of a beam search")
    length_penalty: float = option(1.0, "beams are ranked by log-probability / length ** penalty")
    repetition_penalty: float = option(1.0, "above 1 makes tokens that were seen less probable")
    num_return_sequences: int = option(1, "answers for each prompt")
    seed: int | None = option(None, "the same seed gives the same tokens (default: a new one each run)")
    stop: tuple[str, ...] = option((), "a string that ends the text; may be repeated", style="repeat")
    ignore_eos: bool = option(False, "go on after an end of text")
    add_eos_token: tuple[str, ...] = option((), "further tokens that end the text, as strings or ids", style="several")
    logprobs: int | None = option(None, "report the log-probability of each token and of the N most probable ones")
    output_file: str | None = option(None, "write one JSON line for each prompt")
    compare_hf: str | None = option(None, "run transformers on this Hugging Face folder too and show the difference")
    history_turns: int = option(3, "turns that a chat remembers; older ones are dropped")
    tokenizer_name_or_path: str | None = option(None, "where the tokenizer is (default: with the model)")
    tokenizer_type: str = option("PretrainedFromHF", "PretrainedFromHF, or SentencePiece for a tokenizer.model")
    tokenizer_model: str | None = option(None, "a SentencePiece tokenizer.model")
    tokenizer_not_use_fast: bool = option(False, "use the slow tokenizer of transformers")

    def __post_init__(self) -> None:
        find_tasks(self.task)
        if self.prompt_type is not None:
            prompt_type(self.prompt_type)
            if self.hf_chat_template:
                raise ValueError("--prompt-type and --hf-chat-template are two layouts of one prompt; leave one out")
        if self.compare_hf is not None and any("sampling" in task.name or task.chat for task in find_tasks(self.task)):
            raise ValueError(
                "--compare-hf compares greedy_search and beam_search only; a sample has no one right answer"
            )
        if "chat" in self.task and (self.prompt or self.prompt_ids or self.prompt_file or self.output_file):
            raise ValueError(
                "--task chat reads its prompts from you; leave out --prompt, --prompt-file and --output-file"
            )
        if "chat" in self.task and (self.num_return_sequences > 1 or self.logprobs is not None):
            raise ValueError("--task chat gives one answer as text; leave out --num-return-sequences and --logprobs")
        if self.compare_hf is not None and self.stop:
            raise ValueError("--compare-hf compares whole answers; leave out --stop")
        if self.stop and any(task.beams for task in find_tasks(self.task)):
            raise ValueError("a beam search knows no stop strings; leave out --stop, or end it with --add-eos-token")
        if self.max_new_tokens < 1 or (self.max_length is not None and self.max_length < 1):
            raise ValueError("--max-new-tokens and --max-length must be at least 1")
        if self.history_turns < 0:
            raise ValueError(f"--history-turns is {self.history_turns}; it must be 0 or more")
