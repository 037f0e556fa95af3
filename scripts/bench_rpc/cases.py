"""What is measured, and what we want to reach there."""

TOGETHER = [1, 8, 16]  # sequences at once
TIMED_STEPS = 48  # each with one token of every sequence
PROMPT_TOKENS = 512  # of the prompt whose first token is waited for

TOGETHER_GOALS = {16: 4.0}  # sequences together: at least so many times the peer's rate
PROMPT_GOAL = 0.5  # less than this of the peer's time to the first token
HEADER_BYTES_GOAL = 100  # fewer than this a token and hop, beyond the hidden vector
