"""Discriminative Adversarial Unlearning (Sharma et al. 2024, arXiv 2402.06864)."""
