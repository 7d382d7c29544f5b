"""Recipes: text, perplexity, fine-tuning and the demo, for users who would otherwise copy them from a tutorial."""
