"""Reward functions with TRL's call signature, for tests of the examples that sample."""


def letters(prompts, completions, **columns):
    """A reward that differs for almost all answers of a partly trained model."""
    return [sum(ord(letter) % 7 for letter in text) / (1 + 7 * len(text)) for text in completions]


def raising(prompts, completions, **columns):
    """Raises when an answer is scored."""
    return [1 / (len(text) - len(text)) for text in completions]


def undefined(prompts, completions, **columns):
    """Returns NaN for the last answer."""
    return [0.0] * (len(completions) - 1) + [float("nan")]


def short(prompts, completions, **columns):
    """Returns one reward too few."""
    return [0.0] * (len(completions) - 1)


def words(prompts, completions, **columns):
    """Returns strings instead of numbers."""
    return ["good"] * len(completions)
