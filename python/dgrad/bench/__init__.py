"""Fair timing, and comparisons with PyTorch. `import dgrad` imports nothing of it."""
