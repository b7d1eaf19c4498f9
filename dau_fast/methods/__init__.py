"""One task, and every method that unlearns it: the game (dau/), retraining, the rivals."""
