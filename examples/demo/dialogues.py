"""Short conversations in our own words: greetings, what mindgen is, and simple Python questions.

A topic is one answer and the ways to ask for it. Templates fill names into both, so that they are read, not recalled.
"""

from __future__ import annotations

import random

HOW_ARE_YOU = "I am fine, thank you! How can I help you today?"
HELLO = "Hello! How can I help you?"

SMALL_TALK: dict[str, tuple[str, ...]] = {
    HOW_ARE_YOU: (
        "how are you?",
        "How are you?",
        "how are you",
        "How are you today?",
        "how are you doing?",
        "How are you doing?",
        "Hi, how are you?",
        "Hello, how are you?",
        "hey, how are you?",
        "How is it going?",
        "How do you do?",
        "Are you well?",
    ),
    HELLO: (
        "hello",
        "Hello!",
        "Hello",
        "Hi",
        "hi",
        "Hi!",
        "hi there",
        "Hi there!",
        "hey",
        "Hey!",
        "Good morning",
        "Good morning!",
        "Good evening",
        "good day",
        "Good afternoon!",
        "Greetings!",
    ),
    "You are welcome!": (
        "thanks",
        "Thanks!",
        "Thank you",
        "Thank you!",
        "thank you very much",
        "Thanks a lot!",
        "Great, thanks!",
    ),
    "Goodbye! Have a nice day.": (
        "bye",
        "Bye!",
        "Goodbye",
        "goodbye!",
        "See you",
        "See you later!",
        "I have to go now.",
        "Good night",
    ),
    "I am the demo model of mindgen, a small language model that was trained on Python code.": (
        "Who are you?",
        "who are you?",
        "What are you?",
        "Introduce yourself.",
        "Tell me about yourself.",
        "Are you a human?",
        "What kind of model are you?",
        "Are you a robot?",
    ),
    "I have no name of my own. I am the demo model of mindgen.": (
        "What is your name?",
        "what is your name?",
        "What are you called?",
        "Do you have a name?",
        "What's your name?",
    ),
    "mindgen runs large language models over many devices: it loads weights, splits them and streams tokens.": (
        "What is mindgen?",
        "what is mindgen?",
        "Tell me about mindgen.",
        "What does mindgen do?",
        "Explain mindgen.",
        "What is mindgen for?",
        "Can you explain what mindgen is?",
    ),
    "I can complete Python code, repeat a function, rename things in it, and answer simple questions.": (
        "What can you do?",
        "what can you do?",
        "How can you help me?",
        "What are you good at?",
        "Help",
        "help",
        "Can you help me?",
        "What should I ask you?",
    ),
    "I am a very small model, so I make many mistakes. Please check what I write.": (
        "Are you always right?",
        "Can I trust you?",
        "Do you make mistakes?",
        "Are you smart?",
        "How good are you?",
    ),
    "I have about six million parameters, in eight layers.": (
        "How big are you?",
        "How many parameters do you have?",
        "How large are you?",
        "What is your size?",
        "How many layers do you have?",
    ),
    "I was trained on the source of the Python standard library and on a few short dialogues.": (
        "What were you trained on?",
        "What is your training data?",
        "Where did you learn this?",
        "How were you trained?",
        "What do you know?",
    ),
    "I am not sure about that. I am a small model and I know mostly Python code.": (
        "What is the capital of France?",
        "What is the weather like?",
        "Who won the game?",
        "What time is it?",
        "Tell me the news.",
        "How old is the moon?",
        "What is the meaning of life?",
        "Can you drive a car?",
        "Who is the president?",
        "How far is the sun?",
        "What should I eat?",
        "Do you like music?",
    ),
    "Why did the programmer leave the room? The loop had no end.": (
        "Tell me a joke.",
        "tell me a joke",
        "Do you know a joke?",
        "Make me laugh.",
        "Say something funny.",
    ),
    "A little model read some code,\nand carried every line it owed.": (
        "Write a poem.",
        "Tell me a poem.",
        "Can you write a short poem?",
        "Write me a verse.",
    ),
    "Yes, I am here. What can I do for you?": (
        "Are you there?",
        "Hello, is anyone there?",
        "Can you hear me?",
        "test",
        "Testing.",
        "ping",
    ),
    "I am glad to hear that!": (
        "I am fine.",
        "I am fine, thanks.",
        "I am happy.",
        "That was good.",
        "Well done!",
        "You did well.",
        "Great!",
    ),
    "I am sorry. Please try again with a shorter question.": (
        "That is wrong.",
        "That was wrong.",
        "No, that is not right.",
        "This is bad.",
        "wrong",
    ),
    "I can speak a little English, and some Python.": (
        "Do you speak English?",
        "Which languages do you speak?",
        "What languages do you know?",
    ),
}

FACTS: dict[str, tuple[str, ...]] = {
    "Python is a programming language that is easy to read and to write.": (
        "What is Python?",
        "what is python?",
        "Tell me about Python.",
        "Explain Python.",
    ),
    "A list holds items in order and can be changed, for example [1, 2, 3].": (
        "What is a list?",
        "What is a list in Python?",
        "Explain lists.",
        "what is a list",
    ),
    "A tuple is like a list that cannot be changed, for example (1, 2).": (
        "What is a tuple?",
        "What is a tuple in Python?",
        "Explain tuples.",
    ),
    "A dictionary maps keys to values, for example {'a': 1}.": (
        "What is a dict?",
        "What is a dictionary?",
        "What is a dictionary in Python?",
        "Explain dictionaries.",
    ),
    "A set holds each item only once, for example {1, 2, 3}.": (
        "What is a set?",
        "What is a set in Python?",
        "Explain sets.",
    ),
    "A function is a named piece of code. It starts with def and may return a value.": (
        "What is a function?",
        "What is a function in Python?",
        "Explain functions.",
    ),
    "A class describes objects: what they hold and what they can do.": (
        "What is a class?",
        "What is a class in Python?",
        "Explain classes.",
    ),
    "A string is text between quotes, for example 'hello'.": (
        "What is a string?",
        "What is a string in Python?",
        "Explain strings.",
    ),
    "A loop runs the same code many times. Python has for and while.": (
        "What is a loop?",
        "What is a loop in Python?",
        "Explain loops.",
    ),
    "A generator gives its values one at a time with yield.": (
        "What is a generator?",
        "What does yield do?",
        "Explain generators.",
    ),
    "A decorator takes a function and returns a changed one. It is written with @.": (
        "What is a decorator?",
        "Explain decorators.",
        "What does @ mean?",
    ),
    "An exception is an error that can be caught with try and except.": (
        "What is an exception?",
        "What is an error?",
        "Explain exceptions.",
    ),
    "A module is a file of Python code that other files can import.": (
        "What is a module?",
        "What is a module in Python?",
        "Explain modules.",
    ),
    "The name self is the object that a method was called on.": (
        "What is self?",
        "What does self mean?",
        "Explain self.",
    ),
    "None is the value that stands for nothing.": ("What is None?", "What does None mean?", "Explain None."),
    "It ends the function and gives a value back to the caller.": (
        "What does return do?",
        "What is return?",
        "Explain return.",
    ),
    "It ends the loop at once.": ("What does break do?", "What is break?", "Explain break."),
    "It goes on with the next turn of the loop.": ("What does continue do?", "What is continue?", "Explain continue."),
    "It does nothing. It stands where a statement is needed.": ("What does pass do?", "What is pass?", "Explain pass."),
    "It makes a small function without a name, for example lambda x: x + 1.": (
        "What does lambda do?",
        "What is a lambda?",
        "Explain lambda.",
    ),
    "It closes the file for you, even after an error.": (
        "Why should I use with to open a file?",
        "What does with do?",
        "Explain with open.",
    ),
}

SNIPPETS: dict[str, tuple[str, ...]] = {
    "print('hello')": (
        "Print hello.",
        "How do I print hello?",
        "How do I print text?",
        "Write hello world.",
        "Print something.",
    ),
    "with open({a!r}) as file:\n    {b} = file.read()": (
        "How do I read the file {a} into {b}?",
        "Read {a} into {b}.",
        "Open the file {a} and store the text in {b}.",
    ),
    "for {a} in {b}:\n    print({a})": (
        "Print every {a} in {b}.",
        "How do I loop over {b} and print each {a}?",
        "Write a loop that prints each {a} of {b}.",
    ),
    "{a}.append({b})": ("How do I add {b} to the list {a}?", "Append {b} to {a}.", "Add {b} to the list {a}."),
    "{a}.sort()": ("How do I sort the list {a}?", "Sort {a}.", "Sort the list {a}."),
    "{a} = sorted({b})": ("Sort {b} into {a}.", "How do I get {a} as a sorted copy of {b}?"),
    "len({a})": ("How long is {a}?", "How do I get the length of {a}?", "How many items are in {a}?"),
    "{a} = []": (
        "Make an empty list {a}.",
        "How do I make an empty list called {a}?",
        "Create an empty list named {a}.",
    ),
    "{a} = {{}}": (
        "Make an empty dict {a}.",
        "How do I make an empty dictionary called {a}?",
        "Create an empty dict named {a}.",
    ),
    "{a} = {n}": ("Set {a} to {n}.", "How do I set {a} to {n}?", "Assign {n} to {a}.", "Let {a} be {n}."),
    "import {a}": ("How do I import {a}?", "Import {a}.", "Import the module {a}."),
    "from {a} import {b}": ("Import {b} from {a}.", "How do I import {b} from {a}?"),
    "{a} = int({b})": (
        "Turn {b} into a number {a}.",
        "How do I make an integer {a} from {b}?",
        "Convert {b} to an integer named {a}.",
    ),
    "if {a} in {b}:\n    print('found')": (
        "Check whether {a} is in {b}.",
        "How do I test if {a} is in {b}?",
        "Print found if {a} is in {b}.",
    ),
    "try:\n    {a}()\nexcept Exception as error:\n    print(error)": (
        "Call {a} and catch errors.",
        "How do I catch errors from {a}?",
    ),
    "def {a}({b}):\n    return {b}": (
        "Write a function {a} that returns {b}.",
        "Define a function {a} that returns its argument {b}.",
    ),
    "def {a}({b}, {c}):\n    return {b} + {c}": (
        "Write a function {a} that adds {b} and {c}.",
        "Define a function {a} that returns the sum of {b} and {c}.",
        "Write {a}, which adds {b} and {c}.",
    ),
    "def {a}({b}, {c}):\n    return {b} * {c}": (
        "Write a function {a} that multiplies {b} and {c}.",
        "Define a function {a} that returns the product of {b} and {c}.",
    ),
    "def {a}({b}, {c}):\n    return {b} - {c}": (
        "Write a function {a} that subtracts {c} from {b}.",
        "Define a function {a} that returns {b} minus {c}.",
    ),
    "def {a}({b}):\n    return {b} * {b}": (
        "Write a function {a} that squares {b}.",
        "Define a function {a} that returns the square of {b}.",
    ),
    "def {a}({b}):\n    return {b}[::-1]": (
        "Write a function {a} that reverses {b}.",
        "Define a function {a} that returns {b} reversed.",
    ),
    "def {a}({b}):\n    return max({b})": (
        "Write a function {a} that returns the largest item of {b}.",
        "Define a function {a} that finds the maximum of {b}.",
    ),
    "def {a}({b}):\n    return {b} % 2 == 0": (
        "Write a function {a} that tells whether {b} is even.",
        "Define a function {a} that returns True if {b} is even.",
    ),
    "def {a}({b}):\n    total = 0\n    for item in {b}:\n        total += item\n    return total": (
        "Write a function {a} that sums the items of {b}.",
        "Define a function {a} that returns the total of {b}.",
    ),
    "def {a}({b}):\n    if {b} <= 1:\n        return 1\n    return {b} * {a}({b} - 1)": (
        "Write a function {a} that returns the factorial of {b}.",
        "Define a recursive factorial {a} of {b}.",
    ),
    "def {a}({b}):\n    print({b})": (
        "Write a function {a} that prints {b}.",
        "Define a function {a} that prints its argument {b}.",
    ),
    "class {a}:\n    def __init__(self, {b}):\n        self.{b} = {b}": (
        "Write a class {a} that holds {b}.",
        "Define a class {a} with the attribute {b}.",
    ),
    "class {a}:\n    pass": ("Write an empty class {a}.", "Define a class {a} that does nothing."),
    "while {a} < {n}:\n    {a} += 1": ("Count {a} up to {n}.", "Write a loop that counts {a} up to {n}."),
    "for {a} in range({n}):\n    print({a})": (
        "Print the numbers from 0 to {n} as {a}.",
        "Loop {a} over {n} numbers.",
        "Count from zero up to {n} with {a}.",
    ),
    "{a} = [{b} for {b} in {c} if {b}]": (
        "Keep the true {b} of {c} in {a}.",
        "Write a list {a} of every {b} in {c} that is true.",
    ),
    "assert {a} == {b}": ("Assert that {a} equals {b}.", "How do I check that {a} equals {b} in a test?"),
    "raise ValueError({a!r})": ("Raise a ValueError that says {a}.", "How do I raise an error that says {a}?"),
    "'{a}' + '{b}'": ("Join the strings {a} and {b}.", "How do I join the strings {a} and {b}?"),
}

WORDS = """
add items names value values numbers result data text line lines key path name total count x y a b n f foo bar word
words user users message node tree point size first last left right price width height index row rows queue task job
color table
"""
PLAIN_NAMES = WORDS.split()


def topic(table: dict[str, tuple[str, ...]], rng: random.Random) -> tuple[str, str]:
    answer = rng.choice(list(table))
    return rng.choice(table[answer]), answer


def snippet(rng: random.Random, known: list[str]) -> tuple[str, str]:
    """A question about code, with the same names filled into question and answer."""
    question, answer = topic(SNIPPETS, rng)
    pool = PLAIN_NAMES if rng.random() < 0.6 else known
    filled = dict(zip("abc", rng.sample(pool, 3), strict=True)) | {"n": rng.randint(0, 100)}
    return question.format(**filled).replace("{a!r}", filled["a"]), answer.format(**filled)


def exchange(rng: random.Random, known: list[str]) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.12:
        return rng.choice(SMALL_TALK[HOW_ARE_YOU]), HOW_ARE_YOU
    if kind < 0.5:
        return topic(SMALL_TALK, rng)
    return topic(FACTS, rng) if kind < 0.65 else snippet(rng, known)


def dialogue(rng: random.Random, known: list[str]) -> list[tuple[str, str]]:
    """One conversation: one to four pairs of what the user says and what the assistant answers."""
    return [exchange(rng, known) for _ in range(rng.choice((1, 1, 1, 2, 3, 4)))]
