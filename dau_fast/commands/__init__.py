"""Commands beside unlearning, each with the options it shares with it."""
