"""Retraining and the other methods the game is compared with: one file a method, Task -> Unlearned."""
