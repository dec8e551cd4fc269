"""Reward functions, called as TRL calls its own, for the tests of the examples that sample."""


def letters(prompts, completions, **columns):
    """Of a half-trained model's answers hardly any two are rewarded alike."""
    return [sum(ord(letter) % 7 for letter in text) / (1 + 7 * len(text)) for text in completions]


def raising(prompts, completions, **columns):
    """Raises as an answer is scored."""
    return [1 / (len(text) - len(text)) for text in completions]


def undefined(prompts, completions, **columns):
    """NaN for the last answer."""
    return [0.0] * (len(completions) - 1) + [float("nan")]


def short(prompts, completions, **columns):
    """One reward too few."""
    return [0.0] * (len(completions) - 1)


def words(prompts, completions, **columns):
    """No numbers."""
    return ["good"] * len(completions)
