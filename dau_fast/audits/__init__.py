"""Audits: what tells an unlearned model from retrained ones, and how often it would blame a retrained one."""
